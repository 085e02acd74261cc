"""Sampling settings of one registered checkpoint: several objectives, nothing trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState

from dfu_mlflow.config import RunConfig, load
from dfu_mlflow.pipeline import run_training
from registry.publish import publish
from tuning.summary import best_trials
from tuning.tune import tune

NAMES = ("kid", "coverage", "saturation_w1", "seconds_per_image")


@pytest.fixture(scope="module")
def searched(workplace: Path, study_file: Callable[[Path], Path]) -> tuple[optuna.Study, list[str]]:
    file = study_file(workplace)
    config = load(RunConfig, str(file), ["--train.epochs", "1"])
    run_training(config, publish=lambda result: publish(result, config))
    space = '{"sampling.guidance_scale": {"low": 1, "high": 8}, "sampling.num_inference_steps": {"low": 1, "high": 6}}'
    said = tune(str(file), ["--tune.kind", "sampling", "--tune.trials", "6", "--tune.sampling_space", space])
    return optuna.load_study(study_name="dfu-sampling", storage=f"sqlite:///{workplace}/optuna.db"), said


def test_every_setting_has_every_figure(searched: tuple[optuna.Study, list[str]]) -> None:
    study = searched[0]
    client = MlflowClient()
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 6
    assert [way.name for way in study.directions] == ["MINIMIZE", "MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    for trial in study.trials:
        run = client.get_run(trial.user_attrs["mlflow_run_id"])
        logged = [run.data.metrics[name if "seconds" in name else f"eval/{name}"] for name in NAMES]
        assert logged == trial.values
        assert run.info.status == "FINISHED"
        assert isinstance(trial.params["sampling.num_inference_steps"], int)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 6


def test_the_front_is_printed(searched: tuple[optuna.Study, list[str]]) -> None:
    study, said = searched
    front = best_trials(study)
    for trial, line in zip(front, said[1:-1], strict=True):
        assert not any(
            other.values != trial.values
            and other.values[0] <= trial.values[0]
            and other.values[1] >= trial.values[1]
            and other.values[2] <= trial.values[2]
            and other.values[3] <= trial.values[3]
            for other in study.trials
        )
        assert f"trial {trial.number}: kid {trial.values[0]:.4g} [" in line
        assert "--sampling.guidance_scale" in line
    parent = study.user_attrs["mlflow_run_id"]
    charts = {Path(file.path).name for file in MlflowClient().list_artifacts(parent, "charts")}
    assert {"pareto_front.html", "history_kid.html", "parallel_coordinate_coverage.html"} <= charts
