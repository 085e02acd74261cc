"""LPIPS among pictures: diversity within a class, and distance to the nearest real photograph.

On features of `extractors.lpips_embedding`, where LPIPS is the squared Euclidean distance.

`lpips_diversity` is the mean over all pairs of generated pictures of one class; `lpips_diversity_real` the same over
pairs of photographs of different patients. `lpips_nearest_real` is the mean over generated pictures of the distance to
the nearest held-out photograph: best of N, it rewards blur and is no measure of quality by itself;
`lpips_between_patients` is what held-out photographs have to the nearest photograph of another patient.
"""

from __future__ import annotations

import torch

from dfu_mlflow.metrics.metric import Metric
from dfu_mlflow.metrics.pair import Pair


def lpips_figures(pair: Pair) -> dict[str, float]:
    """The figures above; a side without a single admissible pair gives `nan`."""
    products, (real_ids, fake_ids) = pair.products, pair.class_ids
    real, fake = (_squared(side, side.diagonal(), side.diagonal()) for side in (products.real, products.fake))
    between = _squared(products.cross, products.real.diagonal(), products.fake.diagonal())
    people = {name: place for place, name in enumerate(sorted(set(pair.patients)))}
    person = torch.tensor([people[name] for name in pair.patients])
    others = person[:, None] != person
    different = ~torch.eye(len(fake), dtype=torch.bool)
    return {
        "lpips_diversity": _mean(fake, different & (fake_ids[:, None] == fake_ids)),
        "lpips_diversity_real": _mean(real, others & (real_ids[:, None] == real_ids)),
        "lpips_nearest_real": float(between.amin(0).mean()),
        "lpips_between_patients": float(real.masked_fill(~others, torch.inf).amin(1).mean()),
    }


def _squared(products: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left[:, None] + right - 2 * products).clamp(min=0)


def _mean(distances: torch.Tensor, chosen: torch.Tensor) -> float:
    return float(distances[chosen].mean())


LPIPS = Metric(
    figures={
        "lpips_diversity": "larger",
        "lpips_diversity_real": "neither",
        "lpips_nearest_real": "smaller",
        "lpips_between_patients": "neither",
    },
    values=lpips_figures,
    by_class=("lpips_diversity", "lpips_diversity_real", "lpips_nearest_real"),
)
