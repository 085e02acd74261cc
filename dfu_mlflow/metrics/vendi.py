"""Vendi score (Friedman and Dieng 2023, equation 2): how many unlike pictures a set is worth.

The exponential of the entropy of the eigenvalues of K / N, K the cosine similarities: 1 for N copies of one picture, N
for N orthogonal ones. It needs no reference and grows with N, so it stands beside the score of as many photographs
(`vendi_real`) and is compared at equal N alone.
"""

from __future__ import annotations

import torch

from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.metric import Metric
from dfu_mlflow.metrics.pair import Pair


def vendi_score(features: torch.Tensor) -> float:
    """Vendi score of features [N, D], between 1 and N.

    Raises:
        UserError: for values that are not finite, or rows that are all zero.
    """
    if not bool(torch.isfinite(features).all()):
        raise UserError("features hold values that are not finite: the images or the extractor are broken")
    return vendi_from_products(features.double() @ features.double().T)


def vendi_from_products(products: torch.Tensor) -> float:
    """The same from inner products [N, N]."""
    lengths = products.diagonal().sqrt()
    if not bool((lengths > 0).all()):
        raise UserError("a picture's features are all zero: it has no direction to compare")
    similarities = products / (lengths[:, None] * lengths) / len(products)
    shares = torch.linalg.eigvalsh(similarities).clamp(min=0)
    return float(torch.special.entr(shares).sum().exp())


def _values(pair: Pair) -> dict[str, float]:
    return {"vendi": vendi_from_products(pair.products.fake), "vendi_real": vendi_from_products(pair.products.real)}


VENDI = Metric(figures={"vendi": "larger", "vendi_real": "neither"}, values=_values, by_class=("vendi", "vendi_real"))
