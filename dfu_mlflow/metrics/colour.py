"""Colours against real photographs: the signs of too much guidance (over-saturated, clipped, hard).

Each statistic is given as the generated pictures' mean and as Wasserstein's first distance to the photographs' values,
which is the mean absolute difference of the sorted values and has the statistic's own unit.
"""

from __future__ import annotations

import torch
from scipy import stats

from dfu_mlflow.metrics.extractors.pixels import STATISTICS
from dfu_mlflow.metrics.metric import Metric
from dfu_mlflow.metrics.pair import Pair


def colour_figures(real: torch.Tensor, fake: torch.Tensor) -> dict[str, float]:
    """Mean and distance of each of `STATISTICS`, of real [N, 4] and fake [M, 4]."""
    figures = {}
    for column, name in enumerate(STATISTICS):
        shown, wanted = fake[:, column], real[:, column]
        figures[name] = float(shown.mean())
        figures[f"{name}_real"] = float(wanted.mean())
        figures[f"{name}_w1"] = float(stats.wasserstein_distance(shown.numpy(), wanted.numpy()))
    return figures


def _values(pair: Pair) -> dict[str, float]:
    return colour_figures(pair.real.features, pair.fake.features)


DISTANCES = tuple(f"{name}_w1" for name in STATISTICS)
COLOUR = Metric(
    figures={
        **dict.fromkeys(STATISTICS, "neither"),
        **{f"{name}_real": "neither" for name in STATISTICS},
        **dict.fromkeys(DISTANCES, "smaller"),
    },
    values=_values,
    by_class=DISTANCES,
    floor=DISTANCES,
)
