"""When two reports may be compared, how far a model has come, and whether one checkpoint is better than another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.metric import Better
from dfu_mlflow.types import Estimate, EvalReport

Outcome = Literal["better", "worse", "cannot be told apart", "no verdict"]

MIN_VERDICT_PICTURES = 30
"""Fewer pictures on a side get intervals and no verdict: the intervals' coverage was measured from 40 pictures up."""
POWER = 0.8
MANY = 1_000_000


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints by one figure, on pictures from the same seeds.

    Attributes:
        figure: its name.
        difference: of the first less the second, with its 95 % interval.
        outcome: of the first against the second.
        sentence: the same in words.
        pictures_needed: a side, to tell apart a difference of this size in 80 % of cases; None where they can be
            told apart already, or where nothing can be said.
    """

    figure: str
    difference: Estimate
    outcome: Outcome
    sentence: str
    pictures_needed: int | None = None


def compare(figure: str, difference: Estimate, better: Better, pictures: int) -> Comparison:
    """Say whether the first of two checkpoints is better.

    Args:
        figure: its name.
        difference: first less second, paired as `Reference.compare` pairs them.
        better: which way is better.
        pictures: compared on each side.
    """
    if pictures < MIN_VERDICT_PICTURES or difference.low is None or difference.high is None:
        few = f"{pictures} pictures are fewer than {MIN_VERDICT_PICTURES}"
        why = few if pictures < MIN_VERDICT_PICTURES else "there is no interval"
        sentence = f"{figure}: no verdict, {why} (difference {difference.value:+.4g}{_interval(difference)})"
        return Comparison(figure, difference, "no verdict", sentence)
    shown = f"difference {difference.value:+.4g}{_interval(difference)}"
    if difference.low <= 0 <= difference.high:
        needed = pictures_needed(difference, pictures)
        size = f"more than {MANY:,}" if needed is None else f"about {needed:,}"
        sentence = (
            f"{figure}: cannot be told apart at this sample size ({shown}); if the difference is really this large,"
            f" {size} pictures a side would show it in {POWER:.0%} of cases"
        )
        return Comparison(figure, difference, "cannot be told apart", sentence, needed)
    if better == "neither":
        return Comparison(figure, difference, "no verdict", f"{figure}: different, neither way is better ({shown})")
    outcome: Outcome = "better" if (difference.value < 0) == (better == "smaller") else "worse"
    return Comparison(figure, difference, outcome, f"{figure}: {outcome} ({shown})")


def pictures_needed(difference: Estimate, pictures: int) -> int | None:
    """Pictures a side at which the measured difference, if it is the true one, is found in 80 % of cases.

    The paired variance falls as 1/N when both sides grow, held-out patients with the photographs:
    N' = N ((z_0.975 + z_0.8) s / d)², s the standard error now. None above a million, and where there is no interval.
    """
    if difference.low is None or difference.high is None or difference.value == 0.0:
        return None
    deviation = (difference.high - difference.low) / 2 / float(stats.norm.ppf(0.975))
    reach = float(stats.norm.ppf(0.975) + stats.norm.ppf(POWER))
    needed = pictures * (reach * deviation / difference.value) ** 2
    return math.ceil(needed) if needed <= MANY else None


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f", 95 % interval {estimate.low:+.4g} to {estimate.high:+.4g}"


def require_comparable(first: EvalReport, second: EvalReport) -> None:
    """Refuse to compare figures that were not measured alike.

    Raises:
        UserError: naming both identities.
    """
    if first.identity != second.identity:
        raise UserError(
            f"figures measured as [{first.identity}] and as [{second.identity}] cannot be compared: evaluate both with"
            " the same --metrics.*, --evaluation.samples, --evaluation.seed and data"
        )


def progress(base: Estimate, now: Estimate, floor: float, better: Better = "smaller") -> Estimate:
    """(base - now) / (base - floor): 0 is the untouched base, 1 the floor, below 0 worse than the base.

    The interval carries the uncertainty of `base` and `now` as if they were independent (they share the real
    photographs, so it errs on the wide side) and takes the floor as given.

    Raises:
        ValueError: when the base is not worse than its floor.
    """
    way = base.value - floor
    if (way if better == "smaller" else -way) <= 0:
        side = "above" if better == "smaller" else "below"
        raise ValueError(f"the untouched base ({base.value:.4g}) is not {side} the floor ({floor:.4g})")
    value = (base.value - now.value) / way
    halves = [_half_width(now), _half_width(base)]
    if halves[0] is None or halves[1] is None:
        return Estimate(value)
    half = (halves[0] ** 2 + ((now.value - floor) / way * halves[1]) ** 2) ** 0.5 / abs(way)
    return Estimate(value, value - half, value + half)


def _half_width(estimate: Estimate) -> float | None:
    if estimate.low is None or estimate.high is None:
        return None
    return (estimate.high - estimate.low) / 2
