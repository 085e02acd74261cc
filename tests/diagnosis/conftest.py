"""A run that nothing is wrong with."""

from __future__ import annotations

import pytest

from dfu_mlflow.config import RunConfig, flatten
from dfu_mlflow.diagnosis.case import Case, Life

CURVES = {
    "step/loss": dict.fromkeys(range(1, 661), 0.5),
    "step/lr": dict.fromkeys(range(21, 661), 0.001),
    "train/loss": dict.fromkeys(range(1, 7), 0.4),
    "train/loss_perceptual": dict.fromkeys(range(1, 7), 0.0),
    "train/nonfinite_steps": {0: 0.0, 6: 0.0},
    "val/loss": {0: 0.507, 1: 0.300, 2: 0.291, 3: 0.285, 4: 0.282, 5: 0.280, 6: 0.279},
    "eval/kid": {0: 5.1, 1: 3.5, 2: 3.2, 3: 3.0, 4: 2.9, 5: 2.85, 6: 2.8},
    "eval/class_accuracy": {0: 0.28, 6: 0.9},
    "eval/class_accuracy_reconstructed": {0: 1.0},
    "model/displacement": {0: 0.0, 1: 0.067, 6: 0.09},
    "ema/coverage": {1: 0.96, 6: 0.997},
    "epoch": {epoch: float(epoch) for epoch in range(7)},
}


@pytest.fixture
def sound() -> Case:
    """The figures of a run of the embedded default, with a constant learning rate."""
    config = RunConfig.model_validate(
        {"train": {"lr_schedule": "constant", "epochs": 6, "steps_per_epoch": 110, "learning_rate": 1e-3}}
    )
    return Case(
        "healthy", flatten(config), CURVES, {"exit.reason": "finished", "classes": "3"}, Life("FINISHED", 3600.0)
    )
