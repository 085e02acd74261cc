"""What a metric is: a file of its own defines one, `catalogue` lists them, `Reference` loops over those it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from dfu_mlflow.metrics.intervals import Replicates, block_replicates
from dfu_mlflow.metrics.pair import Pair

Better = Literal["smaller", "larger", "neither"]
"""Which way is towards real photographs; `neither` for a plain description."""
Values = Callable[[Pair], dict[str, float]]


@dataclass(frozen=True)
class Metric:
    """One or more figures that are computed together.

    Attributes:
        figures: name of each figure -> which way is better.
        values: the figures of a pair, quickly: floors and resampling call it often.
        exact_replicates: the figures with their leave-out values, where there is a closed form; None leaves out blocks.
        by_class: figures that are also given for each class.
        floor: figures whose floor is measured between patients.
        headlines: figures that get a progress, with floor and base.
        paired_values: the figures of photographs (real) and their own reconstructions (fake), row for row: the
            autoencoder's floor. None leaves it out.
    """

    figures: Mapping[str, Better]
    values: Values
    exact_replicates: Callable[[Pair], dict[str, Replicates]] | None = None
    by_class: tuple[str, ...] = ()
    floor: tuple[str, ...] = ()
    headlines: tuple[str, ...] = ()
    paired_values: Values | None = None

    def replicates(self, pair: Pair) -> dict[str, Replicates]:
        """Each figure with what it becomes when patients, or generated pictures, are left out."""
        if self.exact_replicates is not None:
            return self.exact_replicates(pair)
        return block_replicates(pair, self.values)
