"""`train` says at once what fires, and `diagnose` finds it again in the run that MLflow holds."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file

from dfu_mlflow.checkpoint import CheckpointStore
from dfu_mlflow.conditioning import FED
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import merge, validate
from dfu_mlflow.diagnosis.case import CLASSES_TAG, STEPS_TAG, Case
from dfu_mlflow.diagnosis.diagnose import diagnose
from dfu_mlflow.diagnosis.finding import Finding, Healthy
from dfu_mlflow.diagnosis.report import BUDGET_TAG
from dfu_mlflow.diagnosis.watch import Watch
from dfu_mlflow.errors import UserError
from dfu_mlflow.participant import TrainingResult
from dfu_mlflow.pipeline import run_training
from dfu_mlflow.schedules import lr_factor
from dfu_mlflow.tracking import Tracker
from registry.diagnose import build_case, run_diagnosis
from registry.promote import findings_budget
from registry.told import DiagnoseOptions, tell_of_checkpoint, tell_of_run
from tests.stores import new_store


@pytest.fixture(scope="module")
def ill(
    small_config_at: Callable[[Path], RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TrainingResult, str]]:
    """A run whose average stands still, and what its terminal showed."""
    folder = tmp_path_factory.mktemp("ill")
    change = {"ema": {"decay": 0.9999, "warmup": False}, "evaluation": {"best_metric": "val_loss"}}
    config = validate(RunConfig, merge(small_config_at(folder).model_dump(mode="json"), change))
    said: list[str] = []
    beat = Tracker.beat

    def heard(tracker: Tracker) -> None:
        if any(frame.function == "generate" for frame in inspect.stack(0)):
            said.append("alive while drawing")
        beat(tracker)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("dfu_mlflow.progress.Console.say", lambda self, text: said.append(text))
        patch.setattr(Tracker, "beat", heard)
        mlflow.set_tracking_uri(new_store(folder))
        yield run_training(config), "\n".join(said)
        mlflow.set_tracking_uri(None)


def test_training_says_it_at_once_and_once(ill: tuple[TrainingResult, str]) -> None:
    result, said = ill
    assert said.count("ema_lag") == 1
    assert said.index("ema_lag") < said.index("epoch 2/2")
    client = MlflowClient()
    findings = json.loads(Path(client.download_artifacts(result.run_id, "findings.json")).read_text(encoding="utf-8"))
    assert findings[0]["id"] == "ema_lag"
    assert client.get_run(result.run_id).data.tags["finding.first"] == "ema_lag"
    report = Path(client.download_artifacts(result.run_id, "report.html")).read_text(encoding="utf-8")
    assert "<h2>Diagnosis</h2>" in report
    assert "ema_lag" in report


def test_a_run_gives_signs_of_life_while_it_draws(ill: tuple[TrainingResult, str]) -> None:
    """One a batch of pictures; the tracker writes every 30 s at most."""
    assert ill[1].count("alive while drawing") > 2


@pytest.mark.parametrize("kept", [True, False])
def test_a_rate_that_leaves_its_schedule_is_said_while_training(kept: bool) -> None:
    config = validate(RunConfig, {"train": {"epochs": 1, "lr_schedule": "cosine", "warmup_steps": 0}})
    watch = Watch(config, steps_per_epoch=20, classes=3)
    for step in range(1, 21):
        factor = lr_factor("cosine", step - 1 if kept else (step - 1) // 4, 0, 20)
        watch.rates[step] = config.train.learning_rate * factor
    diagnosis, news = watch.look({0: {"val/loss": 0.5}, 1: {"val/loss": 0.4, "train/loss": 0.4}})
    assert [word.split()[1] for word in news if "wrong_schedule" in word] == ([] if kept else ["wrong_schedule:"])
    assert isinstance(diagnosis.outcomes["wrong_schedule"], Healthy if kept else Finding)


def test_an_average_that_lags_is_no_blocker_where_the_live_weights_were_the_best() -> None:
    """Registered are the live weights, and a blocker would refuse their promotion."""
    config = validate(RunConfig, {"ema": {"decay": 0.999, "warmup": False}})
    figures = {1: {"ema/coverage": 0.03}}
    (blocker,) = (each for each in Watch(config, 20, 3).look(figures)[0].findings if each.id == "ema_lag")
    (warning,) = (each for each in Watch(config, 20, 3).look(figures, "live")[0].findings if each.id == "ema_lag")
    assert (blocker.severity, warning.severity) == ("blocker", "warning")


def test_training_and_diagnose_agree_on_the_average(ill: tuple[TrainingResult, str]) -> None:
    """The last evaluation may decide which weights were the best; the tags then say what `diagnose` would."""
    result, _ = ill
    tags = MlflowClient().get_run(result.run_id).data.tags
    diagnosis, _ = run_diagnosis(DiagnoseOptions(run=result.run_id, budget="cheap"), None, [])
    (found,) = (each for each in diagnosis.findings if each.id == "ema_lag")
    assert tags["finding.ema_lag"] == found.severity
    assert (found.severity == "warning") == (tags["best.weights"] == "live")


def test_a_base_that_is_elsewhere_leaves_the_curves(
    ill: tuple[TrainingResult, str],
) -> None:
    """A run may be looked at on another machine than it was trained on."""
    told = tell_of_run(ill[0].run_id)
    assert told.configuration is not None
    moved = replace(told, configuration=merge(told.configuration, {"base_model": "/models/sdxl"}))
    case = build_case(DiagnoseOptions(run=ill[0].run_id), moved, {})
    found = diagnose(case, "full")
    assert "ema_lag" in [each.id for each in found.findings]
    assert "give --base_model" in found.unable["text_mismatch"]
    with pytest.raises(UserError, match="/typed"):
        build_case(DiagnoseOptions(run=ill[0].run_id), told, {"base_model": "/typed"})


def test_a_run_of_another_version_is_read_as_far_as_it_is_understood(
    ill: tuple[TrainingResult, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tell_of_run(ill[0].run_id)
    assert told.configuration is not None
    novel = {"seed": 77, "batch_size": 99, "learning_rate": 0.5}  # words that foreign trainers use too
    newer = merge(told.configuration, {"train": {"quantum": True, "max_grad_norm": None}, "novel": novel})
    newer["metrics"]["per_epoch"] = ["efficientnet_lite0", "newnet"]
    monkeypatch.setattr("registry.told.run_configuration", lambda _: newer)
    read = tell_of_run(ill[0].run_id)
    left = "train.quantum, metrics.per_epoch.1, novel"
    assert read.notes == (f"another version wrote its configuration; left out of it: {left}",)
    assert read.settings == {**told.settings, "train.max_grad_norm": None}
    assert read.folder == told.folder
    assert not read.foreign
    refused = merge(told.configuration, {"train": {"compile": True, "fused_backward": True}})
    monkeypatch.setattr("registry.told.run_configuration", lambda _: refused)
    with pytest.raises(UserError, match=r"this one refuses it: .*use one of the two"):
        tell_of_run(ill[0].run_id)


@pytest.mark.parametrize("error", [MlflowException("connection refused"), OSError("507 of the artifact store")])
def test_a_server_that_goes_away_meanwhile_leaves_the_findings(
    ill: tuple[TrainingResult, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def away(*_: object) -> None:
        raise error

    monkeypatch.setattr(MlflowClient, "log_text", away)
    diagnosis, written = run_diagnosis(DiagnoseOptions(run=ill[0].run_id, budget="cheap"), None, [])
    assert diagnosis.findings
    assert written[0].is_file()
    assert "not written to MLflow" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["config", "curves"])
def test_what_a_run_tells_itself_cannot_be_told_again(flag: str, ill: tuple[TrainingResult, str]) -> None:
    options = DiagnoseOptions(run=ill[0].run_id, curves=Path("curves.json") if flag == "curves" else None)
    with pytest.raises(UserError, match=f"--{flag} goes with --checkpoint"):
        run_diagnosis(options, "file.yaml" if flag == "config" else None, [])


def test_diagnose_reads_the_run_from_mlflow(ill: tuple[TrainingResult, str]) -> None:
    result, _ = ill
    diagnosis, written = run_diagnosis(DiagnoseOptions(run=result.run_id, budget="cheap"), None, [])
    assert diagnosis.findings[0].id == "ema_lag"
    assert [path.name for path in written] == ["findings.json", "report.html"]
    assert json.loads(written[0].read_text(encoding="utf-8"))[0]["id"] == "ema_lag"
    tags = MlflowClient().get_run(result.run_id).data.tags
    assert tags["finding.ema_lag"] == "warning" or tags["finding.ema_lag"] == "blocker"
    assert tags["finding.nonfinite"] == "sound"
    assert (tags[STEPS_TAG], tags[CLASSES_TAG]) == ("3", "3")
    report = client_text(result.run_id, "report.html")
    assert report.count("<h2>Diagnosis</h2>") == 1, "the section that training wrote is replaced"
    assert {"<h2>Samples</h2>", "<h2>Settings</h2>"} <= set(re.findall("<h2>.*</h2>", report))


@pytest.mark.parametrize("inside", ["", "checkpoints/step-00000006"])
def test_the_embeddings_trained_on_are_compared(inside: str, ill: tuple[TrainingResult, str]) -> None:
    """A run keeps what it told the network; diagnosing the run or one of its checkpoints finds it."""
    options = DiagnoseOptions(checkpoint=ill[0].folder / inside)
    bench = build_case(options, tell_of_checkpoint(options, None), {}).bench
    assert bench is not None
    assert bench.embeddings == ill[0].folder / FED
    kept = load_file(ill[0].folder / FED)
    assert torch.equal(kept["pooled"], bench.material.conditioner.pooled)


def test_a_cheap_look_never_replaces_a_full_one(ill: tuple[TrainingResult, str]) -> None:
    """Neither `diagnose --budget cheap` nor the watch of a resumed training."""
    result, _ = ill
    client = MlflowClient()
    full, written = run_diagnosis(DiagnoseOptions(run=result.run_id, budget="full"), None, [])
    assert client.get_run(result.run_id).data.tags[BUDGET_TAG] == "full"
    _, beside = run_diagnosis(DiagnoseOptions(run=result.run_id, budget="cheap"), None, [])
    assert [path.name for path in beside] == ["findings-cheap.json"]
    before = CheckpointStore(result.folder / "checkpoints", keep_last=2).complete()[-2]
    config = yaml.safe_load(client_text(result.run_id, "config.yaml"))
    run_training(validate(RunConfig, merge(config, {"resume": str(before)})))
    assert client_text(result.run_id, "findings.json") == full.document()
    assert written[0].read_text(encoding="utf-8") == full.document()
    assert client.get_run(result.run_id).data.tags[BUDGET_TAG] == "full"
    assert beside[0].is_file()
    assert json.loads(client_text(result.run_id, "findings-cheap.json"))[0]["id"] == "ema_lag"
    assert findings_budget(result.run_id) == "full"
    client.log_metric(result.run_id, "step/loss", 0.1, step=99)
    assert findings_budget(result.run_id) == "full but of update 6, and the run has made 99"


def client_text(run_id: str, name: str) -> str:
    """An artifact of a run."""
    return Path(MlflowClient().download_artifacts(run_id, name)).read_text(encoding="utf-8")


def test_quick_figures_are_read_where_they_have_more_points() -> None:
    full = {"eval/kid": {0: 5.0, 2: 2.0}, "eval/I/kid": {0: 5.0, 2: 2.0}, "eval_ema/kid": {2: 3.0}}
    quick = {"eval_quick/kid": {0: 6.0, 1: 4.0, 2: 3.0}, "eval_quick_ema/kid": {1: 9.0}}
    other = {"val/loss": {0: 0.5, 1: 0.4, 2: 0.3}}
    curves = Case("a run", {}, full | quick | other).curves
    assert curves["eval/kid"] == quick["eval_quick/kid"]
    assert curves["eval_ema/kid"] == quick["eval_quick_ema/kid"]
    assert "eval/I/kid" not in curves, "of full evaluations alone"
    assert curves["val/loss"] == other["val/loss"]
    ends = {"eval_quick/kid": {0: 6.0, 2: 3.0}}
    assert Case("a run", {}, full | ends | other).curves["eval/kid"] == full["eval/kid"]
    assert Case("a run", {}, full).curves == full
