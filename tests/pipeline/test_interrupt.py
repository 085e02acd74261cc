"""Ctrl-C and SIGTERM: a checkpoint first, then an end that says so."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from mlflow import MlflowClient

from dfu_mlflow import trainer
from dfu_mlflow.config import RunConfig
from dfu_mlflow.errors import Interrupted
from dfu_mlflow.interrupt import StopRequest
from dfu_mlflow.pipeline import run_training


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_once_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.requested()
        assert signal.getsignal(number) == before, "a second signal acts as usual"
        with pytest.raises(Interrupted, match=number.name):
            stop.check()
    assert signal.getsignal(number) == before


def test_sigterm_writes_a_checkpoint_and_ends_the_run_as_interrupted(
    small_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train_step = trainer.Trainer.train_step

    def step_then_signal(self: trainer.Trainer, position: int) -> None:
        train_step(self, position)
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.Trainer, "train_step", step_then_signal)
    with pytest.raises(Interrupted, match="step 2"):
        run_training(small_config)
    assert list((tmp_path / "out").glob("*/checkpoints/step-00000002/state.json"))
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("dfu-mlflow").experiment_id])
    assert run.info.status == "KILLED"
    assert run.data.tags["exit.reason"].startswith("interrupted")
