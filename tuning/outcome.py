"""What a trial came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna

from tuning.space import Values


@dataclass(frozen=True)
class Outcome:
    """A trial's figures.

    Attributes:
        values: one an objective.
        intervals: objective -> (low, high) of its 95 % interval, where there is one.
        facts: further entries for the trial, kept in the study as JSON.
    """

    values: tuple[float, ...]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Objective(Protocol):
    """Tries one setting."""

    names: tuple[str, ...]
    """Objectives, as figures are called."""

    def __call__(self, trial: optuna.Trial, values: Values, run_id: str) -> Outcome:
        """Measure `values` and write to the MLflow run `run_id`.

        Raises:
            Pruned: when the trial is not worth going on with.
        """
