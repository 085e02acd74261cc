"""What users really have, and no check should warn of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.checks.dominant_loss_term import DominantLossTerm
from dfu_mlflow.diagnosis.checks.ema_lag import EmaLag
from dfu_mlflow.diagnosis.checks.noisy_validation import NoisyValidation
from dfu_mlflow.diagnosis.checks.patient_leakage import shared_stems
from dfu_mlflow.diagnosis.checks.small_sample_fid import SmallSampleFid
from dfu_mlflow.diagnosis.checks.weights_not_moving import WeightsNotMoving
from dfu_mlflow.diagnosis.checks.wrong_schedule import WrongSchedule
from dfu_mlflow.diagnosis.diagnose import ENDED, diagnose
from dfu_mlflow.diagnosis.finding import CannotRun, Finding, Healthy
from dfu_mlflow.errors import Interrupted, UserError
from dfu_mlflow.schedules import lr_factor
from dfu_mlflow.types import Record


def with_figures(sound: Case, curves: dict[str, dict[int, float]], **settings: Any) -> Case:
    changed = {name.replace("__", "."): value for name, value in settings.items()}
    return replace(sound, curves={**sound.curves, **curves}, settings={**sound.settings, **changed})


def test_a_run_in_its_warm_up_is_not_accused_of_standing_still(sound: Case) -> None:
    still = {"model/displacement": {1: 1.6e-4}, "epoch": {1: 1.0}, "step/loss": {19: 0.5}, "val/loss": {0: 0.5, 1: 0.5}}
    young = with_figures(sound, still, train__epochs=30, train__warmup_steps=100)
    assert isinstance(WeightsNotMoving().run(young), CannotRun)
    over = with_figures(young, {"epoch": {30: 30.0}, "model/displacement": {30: 1.6e-4}})
    assert isinstance(WeightsNotMoving().run(over), Finding)


def test_an_average_that_follows_is_sound_however_it_is_stored(sound: Case) -> None:
    follows = with_figures(sound, {"ema/coverage": {1: 0.97}}, ema__dtype="bfloat16", ema__decay=0.999)
    assert isinstance(EmaLag().run(follows), Healthy)
    guessed = with_figures(sound, {"ema/coverage": {}}, ema__dtype="bfloat16", ema__decay=0.9999, ema__warmup=False)
    assert isinstance(EmaLag().run(with_figures(guessed, {"step/loss": {50_000: 0.5}})), Finding)


def test_an_average_that_nobody_looks_at_is_worth_a_note(sound: Case) -> None:
    lags = with_figures(sound, {"ema/coverage": {1: 0.03}}, ema__warmup=False, evaluation__ema=False)
    found = EmaLag().run(lags)
    assert isinstance(found, Finding)
    assert found.severity == "note"


@pytest.mark.parametrize(
    ("name", "patients"),
    [("IMG_2023011{}_{}.jpg", False), ("2023011{}_{}.jpg", False), ("P00{}_{}.jpg", True)],
    ids=["a telephone's names", "a scanner's names", "a patient's names"],
)
def test_days_are_no_patients(name: str, patients: bool) -> None:
    files = [Path(name.format(number % 9, 100_000 + number)) for number in range(40)]
    records = [Record(file, "I", "nobody", "", (64, 64)) for file in files]
    share, _ = shared_stems(records[:30], records[30:])
    assert (share > 0) is patients


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ((0.5, 0.3, 0.2, 0.15, 0.125, 0.11), Healthy),
        (tuple(0.4 * 2.0**-epoch + 0.02 for epoch in range(7)), Healthy),
        ((0.5, 0.3, 0.2, 0.15, 0.14, 0.145), Healthy),
        ((0.109, 0.095, 0.081, 0.095, 0.105, 0.074), Finding),
        ((0.5, 0.109, 0.095, 0.081, 0.095, 0.105, 0.074), Finding),
    ],
    ids=[
        "learns fast",
        "learns exponentially",
        "begins to overfit",
        "the founding run",
        "the same behind a steep fall",
    ],
)
def test_a_steep_smooth_curve_is_not_noise(values: tuple[float, ...], wanted: type, sound: Case) -> None:
    curve = {"val/loss": dict(enumerate(values, start=1))}
    assert isinstance(NoisyValidation().run(with_figures(sound, curve)), wanted)


@pytest.mark.parametrize("warmup", [3, 5, 8])
@pytest.mark.parametrize("offset", [-1, 0])
def test_the_rate_may_be_logged_before_or_after_the_step(offset: int, warmup: int, sound: Case) -> None:
    rates = {step: 1e-3 * lr_factor("constant", step - 1 - offset, warmup, 660) for step in range(1, 100)}
    assert isinstance(WrongSchedule().run(with_figures(sound, {"step/lr": rates}, train__warmup_steps=warmup)), Healthy)
    held = with_figures(sound, {"step/lr": dict.fromkeys(range(1, 100), 1e-4)}, train__warmup_steps=warmup)
    assert isinstance(WrongSchedule().run(held), Finding)


def test_a_term_that_acts_in_few_micro_batches_is_seen_in_these(sound: Case) -> None:
    """At a micro-batch of one most epochs hold no late timestep, and the share there is 0."""
    shares = {epoch: 0.97 if epoch % 4 == 0 else 0.0 for epoch in range(1, 31)}
    term = {"loss__perceptual_loss__enabled": True, "loss__perceptual_loss__weight": 5.0}
    acts = with_figures(sound, {"train/grad_share_perceptual": shares}, **term)
    assert isinstance(DominantLossTerm().run(acts), Finding)
    odd = with_figures(sound, {"train/grad_share_perceptual": {**dict.fromkeys(range(1, 31), 0.0), 7: 0.99}}, **term)
    assert isinstance(DominantLossTerm().run(odd), Healthy)
    mild = {epoch: 0.55 if epoch % 4 == 0 else 0.0 for epoch in range(1, 31)}
    assert isinstance(
        DominantLossTerm().run(with_figures(sound, {"train/grad_share_perceptual": mild}, **term)), Healthy
    )
    never = with_figures(sound, {"train/grad_share_perceptual": dict.fromkeys(range(1, 31), 0.0)}, **term)
    assert isinstance(DominantLossTerm().run(never), Healthy)


def test_a_distance_that_nobody_logged_chooses_nothing() -> None:
    assert isinstance(SmallSampleFid().run(Case("elsewhere", {"evaluation.samples": 50})), CannotRun)
    logged = Case("elsewhere", {"evaluation.samples": 50}, {"eval/fid": {1: 300.0}})
    assert isinstance(SmallSampleFid().run(logged), Finding)


def test_a_name_is_masked_before_it_is_cut() -> None:
    """Half a name of a file is a patient's name still, and no longer looks like a file's."""
    raised = Broken(RuntimeError("x" * 270 + " /data/I/Jane Doe 1970-01-01 left foot.jpg is broken"))
    reason = diagnose(Case("a run"), "cheap", checks=(raised,)).unable["nonfinite"]
    assert "Jane" not in reason
    told = Broken(UserError("no split for Jane Doe", private=("Jane Doe",)))
    assert diagnose(Case("a run"), "cheap", checks=(told,)).unable["nonfinite"] == "no split for [private]"


class Broken(Check):
    """Raises what no check should."""

    id = "nonfinite"
    needs = ("nothing",)
    cost = "cheap"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def examine(self, case: Case) -> Healthy:
        raise self.error


def test_one_checks_defect_loses_no_other_finding(sound: Case) -> None:
    lags = with_figures(sound, {"ema/coverage": {1: 0.03}}, ema__warmup=False)
    diagnosis = diagnose(lags, "cheap", checks=(Broken(RuntimeError("CUDA out of\n memory")), EmaLag()))
    assert [each.id for each in diagnosis.findings] == ["ema_lag"]
    assert diagnosis.unable["nonfinite"] == f"{ENDED} RuntimeError: CUDA out of memory"
    with pytest.raises(Interrupted):
        diagnose(lags, "cheap", checks=(Broken(Interrupted("stop")),))
