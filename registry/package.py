"""A sampler bundle -> a registered model that loads in any process with the listed packages."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from dfu_mlflow.bundle_format import BUNDLE
from dfu_mlflow.config import RunConfig
from registry.adapter import log_adapter
from registry.card import DESCRIPTION_CHARACTERS, CardFacts, model_card
from registry.source import SAMPLER, data_digest

ROOT = Path(__file__).resolve().parent.parent
CARD = "README.md"
"""The model card's file in the bundle; the version's description holds it too."""
ADAPTER_TAG = "adapter_model"
"""Tag of a version: where its LoRA is in MLflow's own flavor."""
CODE = ("dfu_mlflow", "registry")
CODE_SUFFIXES = (".py", ".yaml")
"""The rest of the packages is weights and data: what the sampler needs of them is in its bundle."""
REQUIREMENTS = (
    "accelerate",
    "diffusers",
    "mlflow",
    "numpy",
    "pandas",
    "peft",
    "pillow",
    "pydantic",
    "pyyaml",
    "safetensors",
    "torch",
    "torchvision",
    "transformers",
)
"""What drawing imports; the versions are conda.yaml's."""


@dataclass(frozen=True)
class RegisteredSampler:
    """A version in the model registry.

    Attributes:
        name: registered model.
        version: its version, from 1.
        uri: `models:/NAME/VERSION`.
    """

    name: str
    version: int
    uri: str


def register_sampler(
    bundle: Path,
    config: RunConfig,
    run_id: str,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    model_name: str = SAMPLER,
) -> RegisteredSampler:
    """Log a bundle as a model of a run, register it and move `config.registry.alias` to it.

    Args:
        bundle: folder that `dfu_mlflow.bundle.write_bundle` wrote; copied into the artifact store.
        config: names the registered model and the alias.
        run_id: the run that trained it; its status stays as it is.
        metrics: figures of the checkpoint; become tags of the version, so that gates read them without the run.
        tags: further tags of the version, e.g. `metric_identity`.
        model_name: of the LoggedModel; a run's own sampler keeps its name to itself, for runs are evaluated by it.
    """
    facts = json.loads((bundle / BUNDLE).read_text(encoding="utf-8"))
    card = model_card(CardFacts(config.registry.name, facts, run_id, data_digest(run_id), metrics, tags))
    (bundle / CARD).write_text(card, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        info = Model.log(
            artifact_path=None,
            name=model_name,
            flavor=WithoutPrediction(),
            run_id=run_id,
            validate_serving_input=False,
            python_model=str(ROOT / "registry" / "sampler.py"),
            artifacts={"bundle": str(bundle)},
            code_paths=_code(Path(folder)),
            pip_requirements=pinned(REQUIREMENTS),
            signature=signature(facts["settings"]),
            input_example=pd.DataFrame({"phase": sorted(facts["prompts"]), "seed": range(len(facts["prompts"]))}),
            model_config={"model": f"run {run_id}"},
        )
    figures = {key: repr(float(value)) for key, value in metrics.items()}
    if adapter := log_adapter(bundle, run_id, pinned(REQUIREMENTS)):
        tags = {**tags, ADAPTER_TAG: adapter}
    version = mlflow.register_model(info.model_uri, config.registry.name, tags={**figures, **tags})
    client = MlflowClient()
    client.update_model_version(config.registry.name, version.version, card[:DESCRIPTION_CHARACTERS])
    try:
        client.set_registered_model_alias(config.registry.name, config.registry.alias, version.version)
    except MlflowException:  # of two processes that set a new alias at once PostgreSQL refuses one (MLflow 3.17.2)
        client.set_registered_model_alias(config.registry.name, config.registry.alias, version.version)
    uri = f"models:/{version.name}/{version.version}"
    return RegisteredSampler(str(version.name), int(version.version), uri)


class WithoutPrediction:
    """MLflow's pyfunc flavor, which logs the example as it is given.

    By itself `Model.log` predicts the example (mlflow 3.17.2, `mlflow/models/model.py`), which loads a second sampler
    beside the training that is still in memory; pyfunc's own `save_model` does not know the argument that says no.
    """

    __name__ = mlflow.pyfunc.__name__

    @staticmethod
    def save_model(validate_serving_input: bool, **rest: Any) -> None:
        """Write the model's files."""
        mlflow.pyfunc.save_model(**rest)


def signature(settings: Mapping[str, float]) -> ModelSignature:
    """Input, output and parameters; the parameters' defaults are the bundle's."""
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "phase"), ColSpec(DataType.long, "seed", required=False)]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "image"),
                ColSpec(DataType.string, "phase"),
                ColSpec(DataType.long, "seed"),
                ColSpec(DataType.string, "model"),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("seed", DataType.long, 0),
                ParamSpec("guidance_scale", DataType.double, float(settings["guidance_scale"])),
                ParamSpec("num_inference_steps", DataType.long, int(settings["num_inference_steps"])),
            ]
        ),
    )


def pinned(names: tuple[str, ...]) -> list[str]:
    """`name==version` of each, as conda.yaml has them."""
    environment = yaml.safe_load((ROOT / "conda.yaml").read_text(encoding="utf-8"))
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    versions = dict(line.split("==") for line in pip)
    return [f"{name}=={versions[name]}" for name in names]


def _code(folder: Path) -> list[str]:
    """Copy the packages without weights, data and caches; they then stand beside the model."""
    for package in CODE:
        shutil.copytree(ROOT / package, folder / package, ignore=_not_code)
    return [str(folder / package) for package in CODE]


def _not_code(folder: str, names: list[str]) -> list[str]:
    return [
        name
        for name in names
        if name == "__pycache__" or not ((Path(folder) / name).is_dir() or name.endswith(CODE_SUFFIXES))
    ]
