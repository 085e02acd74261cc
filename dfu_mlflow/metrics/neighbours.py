"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020): support by k neighbours.

A row's ball reaches to its k-th nearest neighbour on its own side.

    precision: share of generated rows inside any real ball          density: real balls a generated row is in, over k
    recall:    share of real rows inside any generated ball          coverage: share of real balls with a generated row

All four depend on N: compare equal sizes, and read them beside their floor. Two sets of one distribution give about
(0.5, 0.5, 1, 1 - 2^-k) at k = 5; coverage falls with mode collapse, and density rises where it happens.
"""

from __future__ import annotations

import torch

from dfu_mlflow.metrics.gram import Gram, gram
from dfu_mlflow.metrics.metric import Metric
from dfu_mlflow.metrics.pair import Pair

NEAREST = 5
"""The authors' k for density and coverage."""


def neighbour_figures(real: torch.Tensor, fake: torch.Tensor, nearest: int = NEAREST) -> dict[str, float]:
    """precision, recall, density and coverage of features real [N, D] and fake [M, D].

    Raises:
        UserError: for features that cannot be compared.
    """
    return neighbours_from_gram(gram(real, fake), nearest)


def neighbours_from_gram(gram: Gram, nearest: int = NEAREST) -> dict[str, float]:
    """The same from inner products; sides of `nearest` rows or fewer take as many neighbours as they have."""
    between = _distances(gram.cross, gram.real.diagonal(), gram.fake.diagonal())
    real_radius, fake_radius = (_radii(side, nearest) for side in (gram.real, gram.fake))
    inside_real, inside_fake = between < real_radius[:, None], between < fake_radius
    return {
        "precision": float(inside_real.any(0).double().mean()),
        "recall": float(inside_fake.any(1).double().mean()),
        "density": float(inside_real.sum(0).double().mean()) / nearest,
        "coverage": float((between.amin(1) < real_radius).double().mean()),
    }


def _distances(products: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Euclidean distances from inner products and squared lengths."""
    return (left[:, None] + right - 2 * products).clamp(min=0).sqrt()


def _radii(products: torch.Tensor, nearest: int) -> torch.Tensor:
    """Distance of each row to its k-th neighbour; it is its own zeroth."""
    lengths = products.diagonal()
    within = _distances(products, lengths, lengths).fill_diagonal_(0.0)
    return within.kthvalue(min(nearest + 1, len(within)), dim=1).values


def _values(pair: Pair) -> dict[str, float]:
    return neighbours_from_gram(pair.products)


NEIGHBOURS = Metric(
    figures={"precision": "larger", "recall": "larger", "density": "larger", "coverage": "larger"},
    values=_values,
    by_class=("density", "coverage"),
    floor=("precision", "recall", "density", "coverage"),
    headlines=("coverage",),
)
