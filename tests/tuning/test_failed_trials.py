"""Trials of real trainings that are killed or fail: tried again or FAILED with the reason, and no run stays RUNNING."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import TrialState

from dfu_mlflow.errors import UserError
from tuning.tune import tune

SMALL = [
    *("--tune.epochs", "2", "--tune.pruner", "none", "--tune.guidance", "3.0"),
    *("--tune.space.prompts.dropout", "[0, 0.1]"),
]


def runs_of(study: optuna.Study) -> list[Run]:
    client = MlflowClient()
    experiment = client.get_run(study.user_attrs["mlflow_run_id"]).info.experiment_id
    return list(client.search_runs([experiment], order_by=["attributes.start_time ASC"]))


def test_a_training_killed_between_two_epochs_is_tried_again(
    workplace: Path, study_file: Callable[[Path], Path]
) -> None:
    file, database = study_file(workplace), workplace / "optuna.db"
    flags = [*SMALL, "--tune.study", "killed", "--tune.trials", "2", "--tune.heartbeat_s", "4"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tuning.tune", "tests.frozen"])
    names = {"FILE": str(file), "FLAGS": flags, "STORE": mlflow.get_tracking_uri(), "FOLDER": str(workplace)}
    child = str(Path(__file__).with_name("tune_child.py"))
    victim = context.Process(target=runpy.run_path, args=(child, names))
    victim.start()
    deadline = time.monotonic() + 600
    study: optuna.Study | None = None
    while study is None or not (study.trials and study.trials[0].intermediate_values):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        if database.is_file() and study is None:
            try:
                study = optuna.load_study(study_name="killed", storage=f"sqlite:///{database}")
            except Exception:  # its tables are being made
                continue
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join()
    assert study.trials[0].state == TrialState.RUNNING, "killed inside the training"
    tune(str(file), flags)

    first, *others = study.trials
    assert [trial.state for trial in others] == [TrialState.COMPLETE] * 2
    assert first.state == TrialState.FAIL
    retries = [trial for trial in others if trial.system_attrs.get("retry_history")]
    assert [(trial.system_attrs["retry_history"], trial.params) for trial in retries] == [([0], first.params)]
    parent, *nested = runs_of(study)
    assert parent.info.status == "FINISHED"
    ended = {int(run.data.tags["optuna.trial"]): run for run in nested}
    assert [ended[number].info.status for number in range(3)] == ["FAILED", "FINISHED", "FINISHED"]
    assert ended[0].data.tags["exit.reason"] == "its worker died"
    assert ended[retries[0].number].data.tags["optuna.retry_of"] == "0"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            [
                *("--loss.perceptual_loss.enabled", "true", "--loss.perceptual_loss.network", "vgg16"),
                *("--loss.perceptual_loss.weights", "no/such/file.pth"),
            ],
            "VGG16's weights are not at no/such/file.pth",
        ),
        (
            [*("--train.learning_rate", "1e38", "--train.max_nonfinite_steps", "1"), "--train.warmup_steps", "0"],
            "the gradient was not finite for 1 steps in a row, last at step 2",
        ),
    ],
)
def test_a_trial_that_cannot_be_trained_says_why(
    workplace: Path, study_file: Callable[[Path], Path], flags: list[str], reason: str
) -> None:
    name = reason[:5].strip()
    fixed = [*SMALL, "--tune.study", name, "--tune.trials", "3", "--tune.max_failures", "1"]
    with pytest.raises(UserError, match=f"1 trials in a row gave no figure .*{reason}"):
        tune(str(study_file(workplace)), [*fixed, *flags])
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{workplace}/optuna.db")
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    runs = [run for run in runs_of(study) if run.data.tags.get("optuna.study") == name]
    assert [run.info.status for run in runs] == ["FAILED", "FAILED"]
    assert all(reason in run.data.tags["exit.reason"] for run in runs)


def test_the_same_command_tries_trials_again_that_failed_in_a_row(
    workplace: Path, study_file: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*SMALL, "--tune.study", "full", "--tune.trials", "1", "--tune.max_failures", "1", "--tune.epochs", "1"]

    def full(*_: object, **__: object) -> None:
        raise UserError("no space left beside Mueller Hans 1.jpg", private=["Mueller Hans 1.jpg"])

    with monkeypatch.context() as patch:
        patch.setattr("tuning.objective.run_training", full)
        with pytest.raises(UserError, match=r"no space left .*; mend that, and the same command tries them again"):
            tune(str(study_file(workplace)), flags)
    study = optuna.load_study(study_name="full", storage=f"sqlite:///{workplace}/optuna.db")
    kept = [study.trials[0].user_attrs, *(run.data.tags for run in runs_of(study))]
    assert not any("Mueller" in str(one) for one in kept)
    tune(str(study_file(workplace)), flags)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert runs_of(study)[0].info.status == "FINISHED"


def test_a_metric_that_guidance_does_not_change_is_refused_before_the_first_training(
    workplace: Path, study_file: Callable[[Path], Path]
) -> None:
    with pytest.raises(UserError, match=r"--evaluation\.best_metric val_loss does not change with guidance"):
        tune(str(study_file(workplace)), [*SMALL, "--evaluation.best_metric", "val_loss"])
