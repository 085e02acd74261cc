"""A run with a budget for evaluation: full figures where they always are, quick ones as one curve beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import merge, validate
from dfu_mlflow.errors import Interrupted
from dfu_mlflow.evaluation_budget import EvaluationPlan, Protocol, Quick, Workload, lay_out
from dfu_mlflow.evaluator import Evaluator, Observation
from dfu_mlflow.participant import TrainingResult
from dfu_mlflow.pipeline import run_training
from dfu_mlflow.training_run import TrainingRun
from tests.stores import new_store

FOUR = {"train": {"epochs": 4}, "evaluation": {"samples": 24}}
"""Epochs 1 to 3 are between the full ones."""


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where runs are tracked."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Protocol], None]:
    """Runs keep to a protocol: no budget gives trainings of a few steps any."""

    def keep(protocol: Protocol) -> None:
        def plan(work: Workload, budget: float | None) -> EvaluationPlan:
            return lay_out(work, Protocol(1, None) if budget is None else protocol)

        monkeypatch.setattr("dfu_mlflow.evaluation_budget.plan", plan)

    return keep


def trained(config: RunConfig, change: dict[str, Any]) -> tuple[TrainingResult, dict[int, dict[str, float]]]:
    """A run's result and figures by epoch."""
    result = run_training(validate(RunConfig, merge(config.model_dump(), change)))
    return result, history(result.folder)


def history(folder: Path) -> dict[int, dict[str, float]]:
    content = json.loads((folder / "history.json").read_text())
    return {int(epoch): entry["figures"] for epoch, entry in content.items()}


def of(figures: dict[str, float], *groups: str) -> dict[str, float]:
    return {name: value for name, value in figures.items() if name.split("/")[0] in groups}


def groups(figures: dict[str, float]) -> set[str]:
    return {name.split("/")[0] for name in figures if name.startswith("eval")}


def best(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "checkpoints" / "best.json").read_text()))


@pytest.mark.parametrize("steps", [2, 1])
def test_full_epochs_are_untouched_and_quick_figures_are_one_curve(
    small_config: RunConfig, tmp_path: Path, planned: Callable[[Protocol], None], steps: int
) -> None:
    planned(Protocol(1, Quick(12, steps)))
    _, without = trained(small_config, FOUR | {"output_dir": str(tmp_path / "without")})
    budget = merge(FOUR, {"evaluation": {"budget": 0.25}, "output_dir": str(tmp_path / "with")})
    result, figures = trained(small_config, budget)
    ends = (0, 4)
    for epoch in ends:
        assert of(figures[epoch], "eval", "eval_ema", "val", "val_ema") == of(
            without[epoch], "eval", "eval_ema", "val", "val_ema"
        )
    for epoch in range(1, 4):
        assert of(figures[epoch], "val") == of(without[epoch], "val")
        assert "eval_quick/kid" in figures[epoch]
    full = [epoch for epoch in figures if "eval/kid" in figures[epoch] or "eval_ema/kid" in figures[epoch]]
    confirmed = set(full) - set(ends)
    assert len(confirmed) <= 1, "only the best by quick figures"
    assert best(result.folder)["epoch"] in full
    assert groups(figures[0]) == {"eval", "eval_quick"}
    assert groups(figures[4]) == {"eval", "eval_ema", "eval_quick", "eval_quick_ema"}
    assert all("eval_quick/kid" in figures[epoch] for epoch in range(5))
    assert figures[0]["eval_quick/kid"] != figures[0]["eval/kid"], "of 12 and of 24 pictures"
    assert figures[4]["eval_quick/kid_floor"] != figures[4]["eval/kid_floor"]
    assert not groups(result.figures) & {"eval_quick", "eval_quick_ema"}
    run = MlflowClient().get_run(result.run_id)
    assert "12 generated" in run.data.params["metric_identity_quick"]
    assert f"{steps} solver steps" in run.data.params["metric_identity_quick"]
    assert "18 generated" in run.data.params["metric_identity"], "as many as are held out"
    shown = MlflowClient().list_artifacts(result.run_id, "images")
    assert all(
        any(f"step+{epoch}+" in file.path or f"step%{epoch}%" in file.path for file in shown) for epoch in range(5)
    )


def chosen_by(values: dict[tuple[int, str], float], monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    """The distance of an epoch's weights, by full or quick figures, is what the test says."""
    judge, conclude = Evaluator.judge, TrainingRun.conclude
    settle = TrainingRun.settle
    now: list[int] = [0]

    def concluded(self: TrainingRun, epoch: int, *rest: Any) -> Any:
        now[0] = epoch
        return conclude(self, epoch, *rest)

    def settled(self: TrainingRun, candidate: Any, seen: Observation) -> None:
        now[0] = candidate.epoch
        settle(self, candidate, seen)

    def judged(self: Evaluator, seen: Observation, shown: str, base: Any) -> Any:
        measured = judge(self, seen, shown, base)
        if (self.config.samples == 24) == full and (now[0], shown) in values:
            measured.figures["kid"] = values[now[0], shown]
        return measured

    monkeypatch.setattr(TrainingRun, "conclude", concluded)
    monkeypatch.setattr(TrainingRun, "settle", settled)
    monkeypatch.setattr(Evaluator, "judge", judged)


BUDGET = merge(FOUR, {"evaluation": {"budget": 0.25}})


def test_an_earlier_epoch_is_confirmed_by_full_figures(
    small_config: RunConfig, planned: Callable[[Protocol], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(Protocol(1, Quick(12, 2)))
    chosen_by({(2, "live"): -9.0}, monkeypatch, full=False)
    chosen_by({(2, "live"): -3.0}, monkeypatch, full=True)
    result, figures = trained(small_config, BUDGET)
    assert (result.best_epoch, result.shown) == (2, "live")
    assert best(result.folder) == {"checkpoint": "step-00000006", "epoch": 2, "score": -3.0, "shown": "live"}
    assert groups(figures[2]) >= {"eval", "eval_quick"}
    assert groups(figures[1]) == groups(figures[3]) == groups(figures[2]) - {"eval"}
    assert result.figures["eval/kid"] == -3.0
    assert result.bundle is not None
    saved = load_file(result.folder / "checkpoints" / "step-00000006" / "weights.safetensors")
    for name, value in load_file(result.bundle / "weights.safetensors").items():
        assert torch.equal(value, saved[name])
    points = MlflowClient().get_metric_history(result.run_id, "eval/kid")
    assert sorted(point.step for point in points) == [0, 2, 4]


def test_an_earlier_epoch_is_measured_with_its_own_weights(
    small_config: RunConfig, tmp_path: Path, planned: Callable[[Protocol], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(Protocol(1, Quick(12, 2)))
    _, without = trained(small_config, FOUR | {"output_dir": str(tmp_path / "without")})
    chosen_by({(2, "ema"): -9.0}, monkeypatch, full=False)
    monkeypatch.setattr("dfu_mlflow.participant.SAME", 2.0)
    _, figures = trained(small_config, BUDGET)
    assert of(figures[2], "eval_ema", "val_ema") == of(without[2], "eval_ema", "val_ema")
    assert groups(figures[2]) == {"eval_ema", "eval_quick", "eval_quick_ema"}


def test_full_figures_may_prefer_the_last_epoch(
    small_config: RunConfig, planned: Callable[[Protocol], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(Protocol(1, Quick(12, 2)))
    chosen_by({(2, "live"): -9.0}, monkeypatch, full=False)
    chosen_by({(2, "live"): 5.0, (4, "live"): 3.0, (4, "ema"): 2.0}, monkeypatch, full=True)
    result, figures = trained(small_config, BUDGET)
    assert (result.best_epoch, result.shown) == (4, "ema")
    assert figures[2]["eval/kid"] == 5.0
    assert result.figures["eval_ema/kid"] == 2.0


def test_a_killed_run_chooses_as_an_unbroken_one(
    small_config: RunConfig, tmp_path: Path, planned: Callable[[Protocol], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(Protocol(1, Quick(12, 2)))
    chosen_by({(2, "live"): -9.0}, monkeypatch, full=False)
    unbroken, expected = trained(small_config, BUDGET | {"output_dir": str(tmp_path / "unbroken")})
    settle = TrainingRun.settle

    def killed(self: TrainingRun, *_: Any) -> None:
        raise Interrupted("before the confirmation was logged")

    monkeypatch.setattr(TrainingRun, "settle", killed)
    broken = BUDGET | {"output_dir": str(tmp_path / "broken")}
    with pytest.raises(Interrupted):
        trained(small_config, broken)
    monkeypatch.setattr(TrainingRun, "settle", settle)
    resumed, figures = trained(small_config, broken | {"resume": "latest"})
    assert figures == expected
    assert best(resumed.folder) == best(unbroken.folder)
    again, _ = trained(small_config, broken | {"resume": "latest"})
    assert (again.best_epoch, again.shown) == (unbroken.best_epoch, unbroken.shown)
    assert best(again.folder) == best(unbroken.folder)


def test_an_average_that_shows_the_same_is_not_drawn(
    small_config: RunConfig, planned: Callable[[Protocol], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(Protocol(1, Quick(12, 2)))
    drawn: list[int] = []
    draw = Evaluator.draw

    def counted(self: Evaluator, *given: Any) -> Any:
        drawn.append(self.config.samples)
        return draw(self, *given)

    monkeypatch.setattr(Evaluator, "draw", counted)
    _, figures = trained(small_config, merge(BUDGET, {"ema": {"decay": 0.0}}))
    assert figures[1]["ema/coverage"] == pytest.approx(1.0)
    full = {"eval", "eval_ema"}  # of the best by quick figures, which may be this one
    assert groups(figures[1]) - full == {"eval_quick"}
    assert groups(figures[4]) == {"eval", "eval_ema", "eval_quick", "eval_quick_ema"}
    assert drawn[:6] == [24, 12, 12, 12, 24, 24]  # base, three epochs of live weights, the last of both
    drawn.clear()
    _, figures = trained(small_config, merge(BUDGET, {"ema": {"decay": 0.9, "warmup": False}}))
    assert figures[1]["ema/coverage"] < 0.98
    assert groups(figures[1]) - full == {"eval_quick", "eval_quick_ema"}


def test_a_run_that_stops_early_has_full_figures_of_its_last_epoch(
    small_config: RunConfig, planned: Callable[[Protocol], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(Protocol(1, Quick(12, 2)))
    chosen_by({(1, "live"): -9.0}, monkeypatch, full=False)
    result, figures = trained(small_config, merge(BUDGET, {"train": {"early_stopping_patience": 1}}))
    assert sorted(figures) == [0, 1, 2]
    assert groups(figures[2]) >= {"eval", "eval_ema"}
    assert groups(figures[1]) >= {"eval", "eval_quick"}
    assert result.best_epoch in (1, 2)
