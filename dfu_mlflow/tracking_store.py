"""Which MLflow run a process writes to: opened fresh, taken over from `mlflow run`, or continued after a kill."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Experiment, RunTag
from mlflow.exceptions import MlflowException

from dfu_mlflow.config.load import without_password
from dfu_mlflow.errors import UserError

RESUMES_TAG = "resumes"
PARENT_TAG = "mlflow.parentRunId"
NAME_TAG = "mlflow.runName"
IMAGES_FOLDER = "images"

logger = logging.getLogger(__name__)

Points = dict[str, dict[int, tuple[int, float]]]
"""Metric name -> step -> (timestamp in ms, value)."""


def prepare_store() -> None:
    """Create the tracking store's tables if they are missing.

    Several processes that open a *new* SQLite store at once crash in each other's migrations (checked with
    MLflow 3.17.2), so the first one in does it under a lock.

    Raises:
        UserError: for a store that cannot be reached.
    """
    uri = mlflow.get_tracking_uri()
    name = hashlib.sha256(f"{uri}:{Path.cwd()}:{Path.home()}".encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f"dfu-mlflow-{name}.lock"):
        try:
            MlflowClient().search_experiments(max_results=1)
        except MlflowException as error:
            reason = without_password(" ".join(str(error).split()))[:300]
            raise UserError(
                f"the tracking store {without_password(uri)} does not answer: {reason}; look at MLFLOW_TRACKING_URI"
            ) from None


def check_store() -> None:
    """Ask a server whether it is there; a database in a file is made when the first run is opened, if it can be.

    Raises:
        UserError: where it does not answer, or cannot be written.
    """
    uri = mlflow.get_tracking_uri()
    if uri.startswith("http"):
        prepare_store()
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///")).absolute()
        place = next(path for path in (file, *file.parents) if path.exists())  # MLflow makes the folders below it
        if not os.access(place, os.W_OK) or not (place == file or place.is_dir()):
            raise UserError(f"the tracking store {file} cannot be written: set MLFLOW_TRACKING_URI")


def set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, object]) -> None:
    """Set tags of a run that other processes may be writing to as well.

    MLflow's `set_tag` looks before it inserts, and of two processes that set the same new tag at once one is refused
    (PostgreSQL, MLflow 3.17.2); a batch is tried again by MLflow itself.
    """
    client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])


def open_run(experiment: str, resumed_run_id: str | None, system_metrics: bool) -> str:
    """Make a run active in this process and give back its id.

    In order: the run to resume; the run that `mlflow run` made for this process; a new one, nested if this process
    has an active run already, in `MLFLOW_EXPERIMENT_ID`, `MLFLOW_EXPERIMENT_NAME` or `experiment`.

    A resumed run goes on as itself. The run that `mlflow run` made for the resuming process stays as its child, so
    that both the curve and the history of attempts can be read.
    """
    prepare_store()
    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
    if resumed_run_id is not None and _exists(resumed_run_id):
        _adopt_placeholder(os.environ.pop("MLFLOW_RUN_ID", None), resumed_run_id)
        run = mlflow.start_run(run_id=resumed_run_id, nested=True, log_system_metrics=system_metrics)
    elif "MLFLOW_RUN_ID" in os.environ:
        run = mlflow.start_run(nested=True, log_system_metrics=system_metrics)
    else:
        run = mlflow.start_run(experiment_id=experiment_id(experiment), nested=True, log_system_metrics=system_metrics)
    run_id = str(run.info.run_id)
    if resumed_run_id not in (None, run_id):
        MlflowClient().set_tag(run_id, RESUMES_TAG, resumed_run_id)
    return run_id


def logged_points(client: MlflowClient, run_id: str) -> Points:
    """Every metric point the run holds, system metrics left out."""
    points: Points = {}
    for key in client.get_run(run_id).data.metrics:
        if not key.startswith("system/"):
            history = client.get_metric_history(run_id, key)
            points[key] = {point.step: (point.timestamp, point.value) for point in history}
    return points


def logged_images(client: MlflowClient, run_id: str) -> set[str]:
    """`KEY+step+STEP` of every image that `log_image` has stored for the run."""
    names = (Path(file.path).name for file in client.list_artifacts(run_id, IMAGES_FOLDER))
    return {name.split("+timestamp+")[0] for name in names}


def logged_checkpoints(client: MlflowClient, run_id: str) -> dict[str, str]:
    """Name -> id of the run's LoggedModels that were finished."""
    experiment_id = client.get_run(run_id).info.experiment_id
    found: dict[str, str] = {}
    token: str | None = None
    while True:
        page = client.search_logged_models(
            [experiment_id], filter_string=f"source_run_id = '{run_id}'", page_token=token
        )
        found.update({model.name: model.model_id for model in page if model.status == "READY"})
        token = page.token
        if not token:
            return found


def _exists(run_id: str) -> bool:
    try:
        stage = MlflowClient().get_run(run_id).info.lifecycle_stage
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise  # the store did not answer: whether it holds the run is not known
        stage = "missing"
    if stage != "active":
        logger.warning(
            "run %s of the resumed checkpoint is %s in %s: training goes on in a new run. To go on in the old one, "
            "set MLFLOW_TRACKING_URI to the store it was started with.",
            run_id,
            stage,
            mlflow.get_tracking_uri(),
        )
    return bool(stage == "active")


def _adopt_placeholder(placeholder: str | None, resumed_run_id: str) -> None:
    """Hang the run that `mlflow run` made for this process under the run it resumes."""
    if placeholder in (None, resumed_run_id):
        return
    client = MlflowClient()
    name = client.get_run(resumed_run_id).info.run_name
    for key, value in {
        PARENT_TAG: resumed_run_id,
        RESUMES_TAG: resumed_run_id,
        NAME_TAG: f"resume of {name}",
    }.items():
        client.set_tag(placeholder, key, value)


def experiment_id(default: str) -> str:
    """The experiment that a new run belongs to: the active run's, `mlflow run`'s, or the one named, made if missing.

    Raises:
        UserError: for a deleted one.
    """
    active = mlflow.active_run()
    if active is not None:
        return str(active.info.experiment_id)
    if "MLFLOW_EXPERIMENT_ID" in os.environ:
        return os.environ["MLFLOW_EXPERIMENT_ID"]
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", default)
    client = MlflowClient()
    found: Experiment | None = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another process made it between the two calls
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise UserError(
            f"MLflow experiment {name!r} is deleted: restore it with `mlflow experiments restore -x "
            f"{found.experiment_id}`, or name another with --tracking.experiment"
        )
    return str(found.experiment_id)
