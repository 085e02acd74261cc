"""MLflow runs and models -> folders that `dfu_mlflow.subject` opens, with the configuration that made them."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlflow
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.uri import is_local_uri

from dfu_mlflow.bundle_format import BUNDLE
from dfu_mlflow.errors import UserError
from dfu_mlflow.subject import local_configuration, local_data_digest, no_such_source

RUN_ID = re.compile(r"(?:runs:/)?([0-9a-f]{32})")
SAMPLER = "sampler"
"""Name of the LoggedModel that `registry.package` makes of a run."""


@dataclass(frozen=True)
class Located:
    """Where a source lies.

    Attributes:
        folder: on this machine.
        configuration: what it was made with, None where nothing tells.
        run_id: the MLflow run that made it, None for a plain folder.
        model_id: its LoggedModel, None for a plain folder.
        version: `NAME/VERSION` where it was found through the model registry.
        data_digest: of the photographs and the split it was trained on, or the start of it.
    """

    folder: Path
    configuration: dict[str, Any] | None
    run_id: str | None = None
    model_id: str | None = None
    version: str | None = None
    data_digest: str | None = None


def locate(source: str) -> Located:
    """Find what the user named.

    Args:
        source: a folder; an MLflow run's id, with or without `runs:/`; `models:/m-ID`; `models:/NAME@ALIAS` or
            `models:/NAME/VERSION`.

    Raises:
        UserError: for a run or model that is not in the tracking store, or holds no sampler.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return Located(folder, local_configuration(folder), data_digest=local_data_digest(folder))
    run = RUN_ID.fullmatch(source)
    try:
        if run is not None:
            return _model(_sampler_of(run[1]), None)
        if source.startswith("models:/m-"):
            return _model(source.removeprefix("models:/"), None)
        if source.startswith("models:/"):
            version = resolve_version(source)
            return _model(_model_id(version), version)
    except MlflowException as error:
        raise UserError(f"--source {source} cannot be had: {str(error).splitlines()[0]}") from None
    raise no_such_source(source)


def resolve_version(uri: str) -> str:
    """`NAME/VERSION` of a registered model; an alias is looked up once, so that everything comes from one version.

    Raises:
        UserError: for another form.
        MlflowException: when it is not registered.
    """
    if not uri.startswith("models:/"):
        raise UserError(f"--model {uri}: give models:/NAME@ALIAS or models:/NAME/VERSION")
    name, _, alias = uri.removeprefix("models:/").partition("@")
    return f"{name}/{MlflowClient().get_model_version_by_alias(name, alias).version}" if alias else name


def data_digest(run_id: str) -> str | None:
    """Of the photographs and the split that a run was given, as MLflow keeps it; None where it was given none."""
    inputs = MlflowClient().get_run(run_id).inputs
    return str(inputs.dataset_inputs[0].dataset.digest) if inputs and inputs.dataset_inputs else None


def _sampler_of(run_id: str) -> str:
    """Id of the model that was packaged at the end of a run, the newest if there are several."""
    client = MlflowClient()
    experiment_id = client.get_run(run_id).info.experiment_id
    wanted = f"source_run_id = '{run_id}' AND name = '{SAMPLER}'"
    found = client.search_logged_models([experiment_id], filter_string=wanted)
    if not found:
        raise UserError(
            f"run {run_id} holds no packaged sampler (registry.register_model was false, or it has not finished): "
            "give the folder of its checkpoints"
        )
    return str(max(found, key=lambda model: model.creation_timestamp).model_id)


def _model_id(version: str) -> str:
    """The LoggedModel behind a version: on SQLite only its `source` tells (checked with MLflow 3.17.2)."""
    name, _, number = version.rpartition("/")
    source = str(MlflowClient().get_model_version(name, number).source)
    if not source.startswith("models:/m-"):
        raise UserError(f"models:/{version} was not registered by this project: its source is {source}")
    return source.removeprefix("models:/")


def _model(model_id: str, version: str | None) -> Located:
    client = MlflowClient()
    model = client.get_logged_model(model_id)
    bundles = sorted(_files(model_id, model.artifact_location).rglob(BUNDLE))
    if not bundles:
        raise UserError(f"model {model_id} holds no sampler of this project ({BUNDLE})")
    run_id = str(model.source_run_id)
    folder, own = bundles[0].parent, run_configuration(run_id)
    return Located(folder, own, run_id, model_id, version, data_digest(run_id))


@contextmanager
def version_files(version: str) -> Iterator[Path]:
    """Files of `NAME/VERSION`: a local store's as they lie there, a server's copied, until the block is left."""
    client = MlflowClient()
    name, _, number = version.rpartition("/")
    place = str(client.get_model_version(name, number).source)
    if place.startswith("models:/m-"):
        place = str(client.get_logged_model(place.removeprefix("models:/")).artifact_location)
    with tempfile.TemporaryDirectory() as folder:
        kept = None if is_local_uri(place) else folder
        yield Path(mlflow.artifacts.download_artifacts(f"models:/{version}", dst_path=kept))


@cache
def _files(model_id: str, location: str | None) -> Path:
    """A model's files: a local store's as they lie there; a server's are copied, once, and go with this process."""
    folder = None
    if not is_local_uri(location):
        folder = tempfile.mkdtemp(prefix="dfu-model-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(mlflow.artifacts.download_artifacts(f"models:/{model_id}", dst_path=folder))


def read_text(run_id: str, file: str) -> str | None:
    """A run's artifact, None where it holds none of that name."""
    client = MlflowClient()
    if not any(found.path == file for found in client.list_artifacts(run_id)):
        return None
    return str(mlflow.artifacts.load_text(f"{client.get_run(run_id).info.artifact_uri}/{file}"))


def run_configuration(run_id: str) -> dict[str, Any] | None:
    """The resolved configuration that a run logged, None where it holds none."""
    text = read_text(run_id, "config.yaml")
    return None if text is None else dict(yaml.safe_load(text))
