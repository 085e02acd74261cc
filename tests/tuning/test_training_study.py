"""A study of real trainings: states, files, the registered best, and the figure it won with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState

from registry.evaluate import EvaluateOptions, evaluate
from tuning.tune import tune

Studied = tuple[optuna.Study, list[str], Path]


@pytest.fixture(scope="module")
def studied(workplace: Path, study_file: Callable[[Path], Path]) -> Studied:
    file = study_file(workplace)
    said = tune(str(file), [])
    study = optuna.load_study(study_name="dfu-training", storage=f"sqlite:///{workplace}/optuna.db")
    return study, said, file


def nested(study: optuna.Study) -> dict[int, Run]:
    client = MlflowClient()
    parent = study.user_attrs["mlflow_run_id"]
    experiment = client.get_run(parent).info.experiment_id
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    return {int(run.data.tags["optuna.trial"]): run for run in runs}


def best_of(study: optuna.Study) -> FrozenTrial:
    return study.best_trial


def test_the_budget_is_spent_and_some_are_pruned(studied: Studied) -> None:
    states = [trial.state for trial in studied[0].trials]
    assert len(states) == 5
    assert set(states) == {TrialState.COMPLETE, TrialState.PRUNED}


def test_runs_end_as_their_trials_did(studied: Studied) -> None:
    study, runs = studied[0], nested(studied[0])
    assert sorted(runs) == [trial.number for trial in study.trials]
    for trial in study.trials:
        run = runs[trial.number]
        wanted = {TrialState.COMPLETE: ("FINISHED", "finished"), TrialState.PRUNED: ("KILLED", "pruned: after epoch 1")}
        status, reason = wanted[trial.state]
        assert run.info.status == status
        assert run.data.tags["exit.reason"].startswith(reason)
        assert run.data.tags["optuna.state"] == trial.state.name
        assert float(run.data.params["trial/train.learning_rate"]) == trial.params["train.learning_rate"]
        assert float(run.data.params["cfg/train.learning_rate"]) == trial.params["train.learning_rate"]
    assert MlflowClient().get_run(study.user_attrs["mlflow_run_id"]).info.status == "FINISHED"


def test_each_finished_training_is_judged_at_its_own_guidance(studied: Studied) -> None:
    client = MlflowClient()
    for trial in studied[0].trials:
        run_id = trial.user_attrs["mlflow_run_id"]
        if trial.state == TrialState.PRUNED:
            assert trial.value == trial.intermediate_values[1]
            assert "curve" not in trial.user_attrs
            continue
        curve = {point[0]: point[1] for point in trial.user_attrs["curve"]}
        assert sorted(curve) == [1.0, 3.0, 4.0]
        assert trial.value == min(curve.values()) == curve[trial.user_attrs["guidance_scale"]]
        history = client.get_metric_history(run_id, "guidance/kid")
        assert {point.step / 100: point.value for point in history} == curve
        assert any(file.path == "guidance_curve.html" for file in client.list_artifacts(run_id))


def test_the_sweep_at_the_trained_guidance_is_what_training_saw(studied: Studied) -> None:
    trial = best_of(studied[0])
    client = MlflowClient()
    name = "eval/kid" if trial.user_attrs["shown"] == "live" else "eval_ema/kid"
    history = client.get_metric_history(trial.user_attrs["mlflow_run_id"], name)
    seen = {point.step: point.value for point in history}[trial.user_attrs["best_epoch"]]
    swept = {point[0]: point[1] for point in trial.user_attrs["curve"]}[3.0]
    assert swept == pytest.approx(seen, rel=1e-9)


def test_the_registered_best_reproduces_the_figure_it_won_with(studied: Studied) -> None:
    trial = best_of(studied[0])
    version = MlflowClient().get_model_version_by_alias("dfu-sampler", "challenger")
    assert version.run_id == trial.user_attrs["mlflow_run_id"]
    assert len(MlflowClient().search_model_versions("name = 'dfu-sampler'")) == 1
    result = evaluate(EvaluateOptions(), None, ["--memorisation.enabled", "false"])
    assert result.figures["eval/kid"] == trial.value


def test_only_the_best_keeps_its_weights(studied: Studied) -> None:
    kept = [trial.number for trial in studied[0].trials if list(Path(trial.user_attrs["folder"]).glob("sampler"))]
    assert kept == [best_of(studied[0]).number]
    assert not [trial for trial in studied[0].trials if (Path(trial.user_attrs["folder"]) / "checkpoints").exists()]


def test_pages_open_offline(studied: Studied) -> None:
    client, parent = MlflowClient(), studied[0].user_attrs["mlflow_run_id"]
    found = {Path(file.path).name: file for file in client.list_artifacts(parent, "charts")}
    assert {"history.html", "parallel_coordinate.html", "guidance_curve.html"} <= found.keys()
    for file in found.values():
        page = Path(client.download_artifacts(parent, file.path)).read_text(encoding="utf-8")
        assert "Plotly.newPlot" in page
        assert 'src="http' not in page


def test_it_says_what_cannot_be_told_apart(studied: Studied) -> None:
    said = studied[1]
    complete = [trial for trial in studied[0].trials if trial.state == TrialState.COMPLETE]
    assert len(said) == len(complete) + 2
    assert f"trial {best_of(studied[0]).number}: kid" in said[1]
    low, high = best_of(studied[0]).user_attrs["intervals"]["kid"]
    assert f"[{low:.4g}, {high:.4g}]" in said[1]
    assert "told apart" in said[-1] or "do not overlap" in said[-1] or "only trial" in said[-1]


def test_the_same_command_goes_on_where_the_budget_is_larger(studied: Studied) -> None:
    study, _, file = studied
    before: list[Any] = [trial.params for trial in study.trials]
    said = tune(str(file), ["--tune.trials", "6", "--registry.promote", "true"])
    judged = MlflowClient().get_model_version_by_alias("dfu-sampler", "challenger")
    assert judged.tags["gate.status"] in said[-1] or "is the champion" in said[-1], "the gate was asked"
    assert [trial.params for trial in study.trials[:5]] == before
    assert len(study.trials) == 6
    assert study.trials[5].params not in before
    tune(str(file), ["--tune.trials", "6"])
    assert len(study.trials) == 6
    assert len(nested(study)) == 6
    assert MlflowClient().get_run(study.user_attrs["mlflow_run_id"]).info.status == "FINISHED"
    versions = MlflowClient().search_model_versions("name = 'dfu-sampler'")
    assert len(versions) == 2, "once for each time that the study ended"
