"""What failing runs share: planted causes, what cannot be told apart, and noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from dfu_mlflow.config.load import validate
from dfu_mlflow.config.study import Plan
from dfu_mlflow.diagnosis.shared_causes import Attempt, Comparison, shared_causes
from dfu_mlflow.diagnosis.shared_report import sentences
from dfu_mlflow.errors import UserError


def attempt(name: str, settings: Mapping[str, Any], value: float | None, **findings: str) -> Attempt:
    return Attempt(name, settings, findings, value, value is None or value < 0.25)


def planted(runs: int = 12) -> list[Attempt]:
    """A high decay ruins a run, the rest are even; flip and rank alternate out of step with it."""
    made = []
    for at in range(runs):
        lagging = at % 2 == 0
        settings = {
            "ema.decay": 0.999 if lagging else (0.9, 0.95)[at % 4 == 1],
            "adapter.rank": (4, 8, 16)[at % 3],
            "data.horizontal_flip": at % 4 < 2,
            "output_dir": f"outputs/{at}",
        }
        made.append(attempt(f"run {at}", settings, 0.05 + at / 100 if lagging else 0.6 + at / 100))
    return made


def texts(comparison: Comparison, at: int = 0) -> list[str]:
    return [trait.text for trait in comparison.causes[at].traits]


def test_a_planted_cause_comes_first_and_is_no_chance() -> None:
    comparison = shared_causes(planted())
    assert texts(comparison) == ["ema.decay >= 0.999"]
    first = comparison.causes[0]
    assert (first.failing_with, first.failing_without, first.other_with, first.other_without) == (6, 0, 0, 6)
    assert first.chance < 0.02
    assert all(cause.chance > 0.2 for cause in comparison.causes[1:] if "decay" not in cause.traits[0].key)
    assert "ema.decay >= 0.999 explains the outcome best" in sentences(comparison)[0]
    assert not any("output_dir" in trait.key for cause in comparison.causes for trait in cause.traits)


def test_settings_that_always_changed_together_are_called_confounded_and_a_plan_separates_them() -> None:
    """The founding analysis: prompts, guidance and perceptual term changed at once."""
    blamed = {"prompts.style": "detailed", "sampling.guidance_scale": 12.0, "loss.perceptual_loss.enabled": True}
    mended = {"prompts.style": "minimal", "sampling.guidance_scale": 3.0, "loss.perceptual_loss.enabled": False}
    runs = [attempt(f"long {at}", blamed, 0.1 + at / 50, guidance_too_high="blocker") for at in range(4)]
    runs += [attempt(f"short {at}", mended, 0.5 + at / 50, guidance_too_high="sound") for at in range(4)]
    comparison = shared_causes(runs)
    (cause,) = comparison.causes
    assert texts(comparison) == [
        "finding guidance_too_high: found",
        "loss.perceptual_loss.enabled = true",
        'prompts.style = "detailed"',
        "sampling.guidance_scale >= 12",
    ]
    assert list(cause.factors()) == ["loss.perceptual_loss", "prompts", "sampling.guidance_scale"]
    assert any(
        line.startswith("confounded: loss.perceptual_loss, prompts and sampling.guidance_scale")
        for line in sentences(comparison)
    )
    plan = validate(Plan, cause.plan())
    assert plan.factors["sampling.guidance_scale"] == {
        "healthy": {"sampling.guidance_scale": 3.0},
        "failing": {"sampling.guidance_scale": 12.0},
    }


def test_what_no_study_may_change_gets_no_plan() -> None:
    small = {"data.resolution_px": 64, "train.learning_rate": 1e-3}
    large = {"data.resolution_px": 32, "train.learning_rate": 1e-4}
    runs = [attempt(str(at), small if at < 3 else large, 0.1 if at < 3 else 0.5) for at in range(6)]
    comparison = shared_causes(runs)
    assert comparison.causes[0].fixed == ["data.resolution_px"]
    assert any("`study` cannot separate them: data.resolution_px" in line for line in sentences(comparison))


def test_settings_of_one_last_name_are_two_factors_and_what_is_drawn_is_none() -> None:
    much = {"train.batch_size": 8, "sampling.batch_size": 8, "seed": 1}
    little = {"train.batch_size": 2, "sampling.batch_size": 2, "seed": 0}
    runs = [attempt(str(at), much if at < 3 else little, 0.1 if at < 3 else 0.5) for at in range(6)]
    assert [list(cause.factors()) for cause in shared_causes(runs).causes] == [
        ["sampling.batch_size", "train.batch_size"]
    ]


def test_one_factor_of_several_settings_is_not_confounded() -> None:
    on = {"loss.perceptual_loss.enabled": True, "loss.perceptual_loss.weight": 0.6}
    off = {"loss.perceptual_loss.enabled": False, "loss.perceptual_loss.weight": 0.0}
    runs = [attempt(str(at), on if at < 3 else off, 0.1 if at < 3 else 0.5) for at in range(6)]
    assert [cause.confounded for cause in shared_causes(runs).causes] == [False]


def test_a_run_without_a_figure_counts_as_worst() -> None:
    runs = [*planted(8), attempt("lost", {**planted(1)[0].settings, "train.mixed_precision": "fp16"}, None)]
    comparison = shared_causes(runs)
    assert comparison.attempts[-1].name == "lost"
    assert "1 of the runs ended without the figure and count as worst" in sentences(comparison)


def test_findings_that_were_not_looked_for_everywhere_are_named() -> None:
    runs = planted(6)
    asked = [Attempt(one.name, one.settings, {"ema_lag": "blocker"}, one.value, one.fails) for one in runs[:3]]
    comparison = shared_causes([*asked, *runs[3:]])
    assert not any("ema_lag" in text for at in range(len(comparison.causes)) for text in texts(comparison, at))
    assert "ema_lag" in sentences(comparison)[-1]


def test_noise_is_seldom_taken_for_a_cause() -> None:
    """20 settings drawn at random for 12 runs: at most 7 % of 200 comparisons call something no chance."""
    generator = np.random.default_rng(3)
    alarms = 0
    for seed in range(200):
        values = generator.permutation(12) / 12
        settings = generator.integers(0, 2, (12, 20))
        runs = [
            attempt(str(at), {f"train.s{n}": bool(settings[at, n]) for n in range(20)}, float(values[at]))
            for at in range(12)
        ]
        alarms += shared_causes(runs, seed).causes[0].chance < 0.05
    assert alarms <= 14


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (planted()[:3], "3 runs cannot be compared"),
        (planted()[1::2], "none of the 6 runs fails"),
        (planted()[::2], "every one of the 6 runs fails"),
    ],
)
def test_what_cannot_be_compared(runs: list[Attempt], said: str) -> None:
    with pytest.raises(UserError, match=said):
        shared_causes(runs)
