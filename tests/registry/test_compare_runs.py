"""`diagnose --runs` over runs that a real tracking store holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from dfu_mlflow import entry
from dfu_mlflow.config import RunConfig, load
from dfu_mlflow.config.load import dump_yaml
from dfu_mlflow.config.study import read_plan
from entrypoints.diagnose import main
from tests.stores import new_store
from tuning.ablation.runs import lay_out


@pytest.fixture(scope="module")
def run_ids(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Eight runs: rate and warm-up changed together and decide, the seed does not; one ended without a figure."""
    folder = tmp_path_factory.mktemp("compared")
    mlflow.set_tracking_uri(new_store(folder))
    client = MlflowClient()
    experiment = client.create_experiment("compared", artifact_location=(folder / "artifacts").as_uri())
    made = []
    for at in range(8):
        starved = at % 2 == 1
        flags = [
            "--train.learning_rate",
            "1e-6" if starved else "1e-3",
            "--train.warmup_steps",
            "90" if starved else "0",
        ]
        config = load(RunConfig, None, [*flags, "--seed", str(at // 2), "--evaluation.samples", "30"])
        run = client.create_run(experiment, run_name=f"run {at}").info.run_id
        client.log_text(run, dump_yaml(config), "config.yaml")
        client.log_param(run, "cfg/train.epochs", config.train.epochs)
        if at != 7:
            client.log_metric(run, "eval/kid_progress", 0.02 * at if starved else 0.5 + 0.01 * at, step=1)
            client.log_metric(run, "eval/kid_progress", 0.0, step=2)  # it collapsed later: the best epoch counts
            client.set_tag(run, "best.epoch", "1")
        client.set_tag(run, "finding.weights_not_moving", "blocker" if starved else "sound")
        client.set_tag(run, "finding.first", "weights_not_moving")
        client.set_terminated(run, "FAILED" if at == 7 else "FINISHED")
        made.append(run)
    others(client, experiment, dump_yaml(config))
    yield made
    mlflow.set_tracking_uri(None)


def others(client: MlflowClient, experiment: str, configuration: str) -> None:
    """What is no training that has ended: a study's own run, an evaluation, one that goes on, a broken one."""
    for kind in ("study", "evaluation", "running", "broken"):
        run = client.create_run(experiment, run_name=kind).info.run_id
        client.log_text(run, "nonsense: 1" if kind == "broken" else configuration, "config.yaml")
        if kind != "study":
            client.log_param(run, "cfg/train.epochs", 2)
        if kind == "evaluation":
            client.log_param(run, "evaluated", "a run's folder")
        if kind != "running":
            client.set_terminated(run, "FINISHED")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_failing_runs_share_is_told_and_a_plan_is_ready(
    run_ids: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", "", "--runs", "all"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "What 4 failing runs share that 4 others do not" in told
    assert "confounded: train.learning_rate and train.warmup_steps always changed together" in told
    assert "1 runs are still RUNNING and left out" in told
    assert "1 runs hold no configuration of this version and are left out" in told
    folder = Path("outputs/diagnose/runs")
    plan = read_plan(str(folder / "separate_1.yaml"), {})
    assert plan.factors["train.warmup_steps"] == {
        "healthy": {"train.warmup_steps": 0},
        "failing": {"train.warmup_steps": 90},
    }
    command = ["--plan", str(folder / "separate_1.yaml"), "--config", str(folder / "best_run.yaml")]
    assert f"entrypoints.study {' '.join(command)}" in told
    assert "weights_not_moving" in (folder / "report.html").read_text(encoding="utf-8")
    lay_out(plan, load(RunConfig, command[3]))


def test_runs_by_id_and_by_filter(run_ids: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--runs", ",".join(run_ids[:6])]) == 0
    assert "What 3 failing runs share that 3 others do not" in " ".join(capsys.readouterr().out.split())
    assert main(["--runs", "attributes.status = 'FINISHED'", "--failing=0.03"]) == 0
    assert "What 1 failing runs share" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--runs", "0" * 32], "--runs 0000"),
        (["--runs", "nonsense ="], "--runs nonsense ="),
        (["--runs", "all", "--experiment", "none"], "--experiment none: no such experiment"),
        (["--runs", "all", "--outcome", "beauty"], "--outcome beauty: none of 8 runs has it: known are kid_progress"),
        (["--runs", "all", "--failing", "much"], "--failing"),
        (["--run", "0" * 32, "--runs", "all"], "--run and --runs"),
        (["--runs", "all", "--colour", "red"], "--colour"),
        (["--outcome", "kid"], "--outcome goes with --runs"),
    ],
)
def test_bad_input_is_told(run_ids: list[str], flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = entry.run(main, flags)
    told = capsys.readouterr()
    assert code == 2
    assert said in told.err
