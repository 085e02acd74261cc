"""`study` end to end on a base of random weights: nested runs, going on after a stop, bad plans."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow import MlflowClient

import tuning.ablation.study as module
from dfu_mlflow.alone import alone
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import dump_yaml, validate
from dfu_mlflow.config.study import PLANS, read_plan
from dfu_mlflow.errors import Interrupted, UserError
from tests.stores import new_store
from tuning.ablation.runs import lay_out
from tuning.ablation.study import LOCK, study

PLAN = {
    "factors": {
        "rate": {"low": {"train.learning_rate": 1e-4}, "high": {"train.learning_rate": 3e-2}},
        "guidance": {"1": {"sampling.guidance_scale": 1.0}, "3": {"sampling.guidance_scale": 3.0}},
        "weights": {"live": {"weights": "live"}, "ema": {"weights": "ema"}},
    },
    "common": {"train.epochs": 1, "ema.decay": 0.999, "ema.warmup": False},
    "seeds": [0, 1],
    "headlines": ["kid"],
}


@pytest.fixture
def files(
    small_config_at: Callable[[Path], RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, str]]:
    """(plan, configuration) as files; runs go to a store of their own."""
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(new_store(tmp_path))
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN, sort_keys=False), encoding="utf-8")
    (tmp_path / "config.yaml").write_text(dump_yaml(small_config_at(tmp_path)), encoding="utf-8")
    yield "plan.yaml", "config.yaml"
    mlflow.set_tracking_uri(None)


def test_a_study_goes_on_where_it_was_stopped(files: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, config = files
    trained: list[int] = []
    real = module.run_training

    def stop_after_two(config: RunConfig, **rest: object) -> object:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(config.seed)
        return real(config, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "run_training", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        study(plan, config, [])
    stopped = MlflowClient().search_runs(["0", "1"], "attributes.status = 'KILLED'")
    assert [run.data.tags["exit.reason"] for run in stopped] == ["stopped; the same command goes on"] * 2
    assert not MlflowClient().search_runs(["0", "1"], "attributes.status = 'RUNNING'")
    monkeypatch.setattr(module, "run_training", real)
    said = study(plan, config, [])
    assert said[0].startswith("kid (smaller is better; 4 trainings)")
    assert [line.split(":")[0].strip() for line in said[1:4]] == ["rate", "guidance", "weights"], said
    client = MlflowClient()
    runs = client.search_runs(["0", "1"])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert (len(parents), len(children)) == (1, 4)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {(run.data.tags["factor.rate"], run.data.tags["factor.seed"]) for run in children} == {
        (level, seed) for level in ("low", "high") for seed in ("0", "1")
    }
    assert "effect/kid/weights" in parents[0].data.metrics
    page = Path(client.download_artifacts(parents[0].info.run_id, "report.html")).read_text(encoding="utf-8")
    assert "guidance: 1 → 3" in page


def test_no_run_stays_running_when_training_cannot_begin_or_the_study_cannot_end(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vgg = {"loss.perceptual_loss.enabled": True, "loss.perceptual_loss.network": "vgg16"}
    factors = {
        "perceptual": {"off": {}, "vgg16": vgg | {"loss.perceptual_loss.weights": "no/such/file.pth"}},
        "guidance": {"1": {"sampling.guidance_scale": "1.0"}, "3": {"sampling.guidance_scale": 3.0}},
    }
    Path("plan.yaml").write_text(yaml.safe_dump(PLAN | {"factors": factors, "seeds": [0]}), encoding="utf-8")

    def full(*_: object) -> str:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "study_page", full)
        with pytest.raises(OSError, match="disk full"):
            study(*files, [])
    client = MlflowClient()
    reasons = {
        run.info.run_name: (run.info.status, run.data.tags["exit.reason"]) for run in client.search_runs(["0", "1"])
    }
    assert reasons["study plan"] == ("FAILED", "OSError: disk full")
    assert reasons["off-seed0"] == ("FINISHED", "finished")
    assert reasons["vgg16-seed0"][0] == "FAILED"
    assert "no/such/file.pth" in reasons["vgg16-seed0"][1]
    said = study(*files, [])
    assert "no figure: perceptual=vgg16, seed 0" in said[-1]
    assert len(client.search_runs(["0", "1"], "attributes.status = 'FINISHED'")) == 2, "nothing was trained again"


def test_a_signal_between_two_trainings_ends_the_studys_run(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(module, "train", signalled)
    with pytest.raises(Interrupted, match="SIGTERM"):
        study(*files, ["--tune.storage", "postgresql://me:secret@host/name"])
    assert "secret" not in Path("out/study.json").read_text(encoding="utf-8")
    parent = MlflowClient().search_runs(["0", "1"])[0]
    assert (parent.info.status, parent.data.tags["exit.reason"]) == ("KILLED", "stopped; the same command goes on")
    with pytest.raises(Interrupted, match="SIGTERM"):
        study(*files, ["--data.cache_dir", "elsewhere", "--tracking.experiment", "other"])


def test_trainings_that_fail_in_a_row_are_tried_again_by_the_same_command(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise UserError("no space left")

    monkeypatch.setattr(module, "run_training", full)
    tried = []
    for _ in range(2):
        with pytest.raises(UserError, match=r"3 trainings in a row .* no space left; mend that, and the same command"):
            study(*files, [])
        journal = json.loads(Path("out/study.json").read_text(encoding="utf-8"))
        assert not any("failed" in entry for entry in journal["runs"])
        tried.append([entry["run_id"] for entry in journal["runs"]])
        del journal["facts"]["config"]["loss.noise_offset"]
        Path("out/study.json").write_text(json.dumps(journal), encoding="utf-8")  # of a version that did not know it
    assert tried[0] == tried[1]
    assert len(tried[0]) == 3


def test_two_processes_on_one_folder(files: tuple[str, str]) -> None:
    with alone(Path("out") / LOCK, "busy"), pytest.raises(UserError, match="another process works on the study in"):
        study(*files, [])


def test_every_built_in_plan_can_be_configured() -> None:
    for path in PLANS.glob("*.yaml"):
        experiment = lay_out(read_plan(path.stem, {}), validate(RunConfig, {}))
        assert len(experiment.runs()) >= 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"factors": {"rate": {"a": {"train.learning_rte": 1}, "b": {"train.learning_rate": 2}}}}, "learning_rte"),
        ({"factors": {"rate": {"a": {"train.learning_rate": -1}, "b": {"train.learning_rate": 2}}}}, "greater than 0"),
        ({"factors": {"rate": {"a": {"train.learning_rate": 1}}}}, "has 1 levels"),
        ({"factors": {"shown": {"a": {"weights": "best"}, "b": {"weights": "ema"}}}}, "live or ema"),
        ({"factors": {"f": {"a": {"weights": "live"}, "b": {"weights": "ema", "ema.decay": 0.5}}}}, "needs a training"),
        ({"fraction": "half"}, "half fraction of 1"),
        ({"repeats": 3}, "repeats"),
        ({"seeds": [0, 0]}, "named once"),
        ({"factors": {"rate!": PLAN["factors"]["rate"]}}, "'rate!' cannot name a factor"),
        ({"factors": {"f": {"../x": {"weights": "live"}, "b": {"weights": "ema"}}}}, "'../x' cannot name"),
        ({"factors": {"f" * 61: PLAN["factors"]["rate"]}}, "60 characters at most"),
        ({"factors": {"seed": PLAN["factors"]["rate"]}}, "no factor may be called seed"),
        (
            {
                "factors": {
                    "a": {"x": {"ema.decay": 0.5}, "x-y": {"ema.decay": 0.6}},
                    "b": {"y-z": {"train.learning_rate": 0.1}, "z": {"train.learning_rate": 0.2}},
                }
            },
            "both called x-y-z-seed0",
        ),
        ({"factors": {"f": {"a": {"sampling.batch_size": 1}, "b": {"sampling.batch_size": 2}}}}, "batch_size must be"),
        ({"factors": {"f": {"a": {"sampling.gudance": 1}, "b": {"sampling.gudance": 2}}}}, "no setting of the sampler"),
        ({"factors": {"f": {"a": {"data.root": "x"}, "b": {"data.root": "y"}}}}, "data.root must be the same"),
        ({"factors": {"f": {"a": {"evaluation.samples": 4}, "b": {"evaluation.samples": 8}}}}, "samples must be"),
        ({"factors": {"f": {"a": {"metrics.per_epoch": []}, "b": {}}}}, "per_epoch must be the same"),
        ({"common": {"seed": 3}}, "common.seed is set by the study"),
    ],
)
def test_plans_that_cannot_be_worked_with(files: tuple[str, str], change: dict[str, object], said: str) -> None:
    Path("plan.yaml").write_text(yaml.safe_dump(PLAN | change, sort_keys=False), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        study(*files, [])


def test_another_studys_folder_is_refused(files: tuple[str, str]) -> None:
    Path("out").mkdir()
    Path("out/study.json").write_text('{"format": 1, "facts": {}, "parent": null, "runs": []}', encoding="utf-8")
    with pytest.raises(UserError, match="holds another study"):
        study(*files, [])


def test_a_plan_that_is_not_there(files: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="neither a file nor one of control, seed_claims"):
        study("seed_claim", files[1], [])
