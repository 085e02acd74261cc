"""Factorial designs of two-level factors (Montgomery, Design and Analysis of Experiments, chapters 6 and 8).

A factor is either *trained* (another level is another training run) or *sampled* (another level is other sampling of
the same weights). Trained factors make the runs; every run is sampled at all combinations of the sampled factors. That
is a split plot: what a training run does by chance is shared by all of its samplings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dfu_mlflow.errors import UserError

Cell = Mapping[str, str]
Fraction = Literal["full", "half"]
HALF_NEEDS = 5
"""Trained factors from which a half fraction keeps main effects and two-factor interactions apart (resolution V)."""


@dataclass(frozen=True)
class Factor:
    """One thing that is varied.

    Attributes:
        name: as the report calls it.
        low, high: names of its levels; an effect is `high` minus `low`.
        sampled: no training run of its own.
    """

    name: str
    low: str
    high: str
    sampled: bool = False

    def code(self, level: str) -> float:
        """-1/2 for `low`, +1/2 for `high`: a coefficient is then a difference between levels."""
        return 0.5 if level == self.high else -0.5


def cells(factors: Sequence[Factor], fraction: Fraction = "full") -> list[dict[str, str]]:
    """Combinations of levels; the half fraction keeps those whose signs multiply to +1 (I = AB...K).

    Raises:
        UserError: for a half fraction of fewer factors than keep two-factor interactions apart.
    """
    if fraction == "half" and len(factors) < HALF_NEEDS:
        raise UserError(
            f"a half fraction of {len(factors)} trained factors mixes interactions with main effects: it needs "
            f"{HALF_NEEDS}; set --plan.fraction full"
        )
    names = [factor.name for factor in factors]
    every = [dict(zip(names, levels, strict=True)) for levels in itertools.product(*((f.low, f.high) for f in factors))]
    if fraction == "full":
        return every
    return [cell for cell in every if math.prod(factor.code(cell[factor.name]) for factor in factors) > 0]
