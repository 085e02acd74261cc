"""Sampling settings of one registered checkpoint: several objectives, nothing trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlflow
import optuna
import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState

from dfu_mlflow.config import RunConfig, load
from dfu_mlflow.errors import UserError
from dfu_mlflow.pipeline import run_training
from dfu_mlflow.sampling import Sampler
from registry.promote import PromoteOptions, promote
from registry.publish import publish
from registry.source import locate
from tuning.summary import best_trials
from tuning.tune import tune

SPACE = '{"sampling.guidance_scale": {"low": 1, "high": 8}, "sampling.num_inference_steps": {"low": 1, "high": 6}}'
NAMES = ("kid", "coverage", "saturation_w1", "seconds_per_image")


@pytest.fixture(scope="module")
def searched(workplace: Path, study_file: Callable[[Path], Path]) -> tuple[optuna.Study, list[str]]:
    file = study_file(workplace)
    config = load(RunConfig, str(file), ["--train.epochs", "1"])
    run_training(config, publish=lambda result: publish(result, config))
    said = tune(str(file), ["--tune.kind", "sampling", "--tune.trials", "6", "--tune.sampling_space", SPACE])
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


def test_the_winner_becomes_the_default_of_a_new_version_of_the_same_weights(
    searched: tuple[optuna.Study, list[str]],
) -> None:
    study, client = searched[0], MlflowClient()
    winner, source = best_trials(study)[0], client.get_model_version("dfu-sampler", "1")
    version = client.get_model_version_by_alias("dfu-sampler", "challenger")
    assert (int(version.version), version.run_id) == (2, source.run_id)
    assert version.tags["tuned_from"] == "dfu-sampler/1"
    assert version.tags["optuna.study"] == "dfu-sampling"
    assert version.tags["study.run_id"] == study.user_attrs["mlflow_run_id"]
    assert float(version.tags["eval/kid"]) == winner.values[0]
    parameters = mlflow.models.get_model_info("models:/dfu-sampler/2").signature.params
    defaults = {parameter.name: parameter.default for parameter in parameters}
    assert defaults["guidance_scale"] == winner.params["sampling.guidance_scale"]
    assert defaults["num_inference_steps"] == winner.params["sampling.num_inference_steps"]
    before, after = locate("models:/dfu-sampler/1"), locate("models:/dfu-sampler/2")
    assert Sampler.load(after.folder, "cpu").settings.guidance_scale == defaults["guidance_scale"]
    assert Sampler.load(before.folder, "cpu").settings.guidance_scale == 3.0
    weights = [(found.folder / "weights.safetensors").read_bytes() for found in (before, after)]
    assert weights[0] == weights[1]
    assert after.data_digest == before.data_digest is not None
    assert locate(str(source.run_id)).model_id == before.model_id, "a run is still evaluated as it was trained"


def test_a_study_goes_on_with_the_version_its_alias_stood_for(
    searched: tuple[optuna.Study, list[str]],
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = searched[0]
    flags = ["--tune.kind", "sampling", "--tune.sampling_space", SPACE, "--registry.register_model", "false"]
    for trials in ("7", "7"):
        tune(str(workplace / "study.yaml"), [*flags, "--tune.trials", trials])
        assert "@challenger is models:/dfu-sampler/2 by now" in capsys.readouterr().out
        assert len(study.trials) == 7
        assert MlflowClient().get_run(study.user_attrs["mlflow_run_id"]).info.status == "FINISHED"
    assert study.user_attrs["made_for"]["source"] == "models:/dfu-sampler/1"
    with pytest.raises(UserError, match="source was models:/dfu-sampler/1, is models:/dfu-sampler/2"):
        tune(str(workplace / "study.yaml"), [*flags, "--tune.source", "models:/dfu-sampler/2"])


def test_the_winner_goes_through_the_gate_with_its_own_settings(
    searched: tuple[optuna.Study, list[str]],
) -> None:
    """Against the version it was tuned from: the same weights, so that only the settings can make a difference."""
    client = MlflowClient()
    client.set_registered_model_alias("dfu-sampler", "champion", "1")
    outcome = promote(PromoteOptions(model="models:/dfu-sampler/2"), None, ["--gates.loads.enabled", "false"])
    tags = client.get_model_version("dfu-sampler", "2").tags
    assert tags["gate.rival"] == "1"
    assert tags["gate.status"] == ("passed" if outcome.promoted else "refused")
    assert tags["gate/eval/kid"] == tags["eval/kid"], "as the study drew it"
    wanted = best_trials(searched[0])[0].params
    logged = client.get_run(tags["gate.run_id"]).data.params
    assert {name: float(logged[f"cfg/{name}"]) for name in wanted} == pytest.approx(wanted)
    assert float(tags["gate/champion/eval/kid"]) != float(tags["gate/eval/kid"])
