"""Floors: how far apart real photographs of *other patients* are, at the same size and class proportions.

A generated set cannot be expected below its floor; below it, suspect copies of training photographs or a broken metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from scipy import stats

from dfu_mlflow import runtime
from dfu_mlflow.metrics.frechet import frechet_from_gram
from dfu_mlflow.metrics.gram import Gram, gram
from dfu_mlflow.metrics.kernel import kernel_from_gram
from dfu_mlflow.metrics.matching import FeatureRows, matched_rows, patient_order
from dfu_mlflow.types import Estimate

DISTANCES: Mapping[str, Callable[[Gram], float]] = {"fd": frechet_from_gram, "kid": kernel_from_gram}


def floors(
    held_out: torch.Tensor, training: FeatureRows, counts: Mapping[int, int], draws: int, seed: int
) -> dict[str, Estimate]:
    """Both distances between held-out features [N, D] and `draws` random sets of training patients.

    Each draw takes training patients whole, in random order, until `counts` (class -> images) is filled.

    Returns:
        `fd` and `kid`: mean over the draws, and the range in which 95 % of such sets fall (Student's prediction
        interval). Draws share patients where training holds few of them; the range is then too narrow.
    """
    values: dict[str, list[float]] = {name: [] for name in DISTANCES}
    for draw in range(draws):
        order = patient_order(training.patients, runtime.generator(seed, "metrics/floor", draw))
        products = gram(held_out, training.features[matched_rows(training.class_ids, counts, order)])
        for name, distance in DISTANCES.items():
            values[name].append(distance(products))
    return {name: _range(torch.tensor(found, dtype=torch.float64)) for name, found in values.items()}


def _range(values: torch.Tensor) -> Estimate:
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(values.std()) * (1 + 1 / len(values)) ** 0.5
    return Estimate(mean, mean - half, mean + half)
