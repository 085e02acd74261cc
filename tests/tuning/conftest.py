"""A study's configuration on the random base, and an own folder with an own tracking store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
import yaml

from dfu_mlflow.config import RunConfig
from tests.stores import new_store

SPACE = {
    "train.learning_rate": {"low": 1e-5, "high": 3e-2, "log": True},
    "prompts.style": ["minimal", "detailed"],
    "ema.decay": [0.5, 0.9],
}


@pytest.fixture(scope="session")
def study_file(small_config_at: Callable[[Path], RunConfig]) -> Callable[[Path], Path]:
    """Writes the configuration of a study of very small trainings below a folder."""

    def write(folder: Path) -> Path:
        tree = small_config_at(folder).model_dump(mode="json")
        tree["tune"] = {
            "trials": 5,
            "storage": f"sqlite:///{folder}/optuna.db",
            "space": SPACE,
            "startup_trials": 2,
            "pruner": "asha",
            "epochs": 2,
            "steps_per_epoch": 2,
            "samples": 12,
            "samples_per_setting": 12,
            "guidance": [1.0, 4.0],
            "heartbeat_s": 1,
        }
        path = folder / "study.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of a module's tests, with a tracking store of its own."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for variable in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(variable, raising=False)
        mlflow.set_tracking_uri(new_store(folder))
        yield folder
        mlflow.set_tracking_uri(None)
