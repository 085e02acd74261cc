"""Floors: how far apart real photographs of *other patients* are, at the same size and class proportions.

A generated set cannot be expected below its floor; below it, suspect copies of training photographs or a broken metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from scipy import stats

from dfu_mlflow import runtime
from dfu_mlflow.metrics.matching import FeatureRows, matched_rows, patient_order
from dfu_mlflow.metrics.metric import Metric
from dfu_mlflow.metrics.pair import Pair
from dfu_mlflow.types import Estimate

LARGEST_SHARE = 0.8
"""Of the training photographs in one draw: above it draws are nearly the same set, and say nothing about others."""


def floors(
    metrics: Sequence[Metric],
    held_out: FeatureRows,
    training: FeatureRows,
    counts: Mapping[int, int],
    draws: int,
    seed: int,
) -> dict[str, Estimate]:
    """Figures between held-out rows and `draws` random sets of training patients.

    Each draw takes training patients whole, in random order, until `counts` (class -> images) is filled.

    Returns:
        Each figure that has a floor: mean over the draws, and the range in which 95 % of sets of new patients fall
        (Student's prediction interval). Draws of a share f of the training photographs overlap, so they scatter less
        than sets of new patients: their variance is divided by 1 - f. Measured over 200 repetitions, 94 to 96 % of new
        sets fall inside for f from 1/6 to 2/3 (without the division 67 to 91 %). No range for f above `LARGEST_SHARE`.
    """
    values: dict[str, list[float]] = {}
    rows = torch.empty(0)
    for draw in range(draws):
        order = patient_order(training.patients, runtime.generator(seed, "metrics/floor", draw))
        rows = matched_rows(training.class_ids, counts, order)
        pair = Pair(held_out, training.take(rows))
        for metric in (metric for metric in metrics if metric.floor):
            for name, value in metric.values(pair).items():
                if name in metric.floor:
                    values.setdefault(name, []).append(value)
    share = len(rows) / len(training)
    return {name: _range(torch.tensor(found, dtype=torch.float64), share) for name, found in values.items()}


def _range(values: torch.Tensor, share: float) -> Estimate:
    """Variance of a new set about the mean of the draws: its own, that of the training patients, that of the draws."""
    mean = float(values.mean())
    if len(values) < 2 or share > LARGEST_SHARE:
        return Estimate(mean)
    scatter = float(values.var())
    deviation = (scatter / (1 - share) * (1 + share) + scatter / len(values)) ** 0.5
    half = float(stats.t.ppf(0.975, len(values) - 1)) * deviation
    return Estimate(mean, mean - half, mean + half)
