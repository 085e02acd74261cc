"""Two processes, each on a card of its own, learn what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import dump_yaml, merge, validate

# What libraries warn of on a card is not known yet.
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).resolve().parents[2]


def trained(folder: Path, config: RunConfig, *options: str) -> tuple[list[float], str]:
    """Run `train` as a user does; the loss of each step, and what was printed."""
    folder.mkdir()
    (folder / "run.yaml").write_text(dump_yaml(config), encoding="utf-8")
    own = {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "NCCL_DEBUG": "INFO"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    command = [sys.executable, "-m", "entrypoints.train", "--config", str(folder / "run.yaml"), *options]
    done = subprocess.run(command, cwd=folder, env={**kept, **own}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    client = MlflowClient(own["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    points = client.get_metric_history(run.info.run_id, "step/loss")
    return [point.value for point in sorted(points, key=lambda point: point.step)], done.stdout + done.stderr


@pytest.mark.parametrize("launch", ["ddp", "fsdp2"])
def test_two_cards_learn_what_one_does(
    device: torch.device, small_config_at: Callable[[Path], RunConfig], tmp_path: Path, launch: str
) -> None:
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device here: NCCL needs one for each process")
    change = {
        "device": "auto" if device.type == "cuda" else "cpu",
        "train": {"epochs": 1, "steps_per_epoch": 4},
        "registry": {"register_model": False},
        "metrics": {"per_epoch": ["colour"]},
    }
    config = validate(RunConfig, merge(small_config_at(tmp_path).model_dump(mode="json"), change))
    alone, _ = trained(tmp_path / "alone", config)
    together, printed = trained(tmp_path / "together", config, "--launch", launch, "--processes", "2")
    assert len(alone) == 4
    assert together == pytest.approx(alone, rel=1e-3)
    assert ("NCCL INFO" in printed) == (device.type == "cuda")
