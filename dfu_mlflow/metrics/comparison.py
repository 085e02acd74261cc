"""When two reports may be compared, and how far a model has come."""

from __future__ import annotations

from dfu_mlflow.errors import UserError
from dfu_mlflow.types import Estimate, EvalReport


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


def progress(base: Estimate, now: Estimate, floor: float) -> Estimate:
    """(base - now) / (base - floor): 0 is the untouched base, 1 the floor, below 0 worse than the base.

    The interval carries the uncertainty of `base` and `now` as if they were independent (they share the real
    photographs, so it errs on the wide side) and takes the floor as given.

    Raises:
        ValueError: when the base is not above its floor.
    """
    way = base.value - floor
    if way <= 0:
        raise ValueError(f"the untouched base ({base.value:.4g}) is not above the floor ({floor:.4g})")
    value = (base.value - now.value) / way
    halves = [_half_width(now), _half_width(base)]
    if halves[0] is None or halves[1] is None:
        return Estimate(value)
    half = (halves[0] ** 2 + ((now.value - floor) / way * halves[1]) ** 2) ** 0.5 / way
    return Estimate(value, value - half, value + half)


def joined(first: EvalReport, second: EvalReport) -> EvalReport:
    """One report of the same samples seen through two extractors; its identity names both.

    Raises:
        ValueError: when the reports share a metric or show different weights.
    """
    shared = first.values.keys() & second.values.keys()
    if shared or first.weights != second.weights:
        raise ValueError(f"reports of {first.weights} and {second.weights} weights share {sorted(shared)}")
    return EvalReport(
        values={**first.values, **second.values},
        identity=f"{first.identity} + {second.identity}",
        weights=first.weights,
        notes={**second.notes, **first.notes},
    )


def _half_width(estimate: Estimate) -> float | None:
    if estimate.low is None or estimate.high is None:
        return None
    return (estimate.high - estimate.low) / 2
