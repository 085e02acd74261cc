"""Frechet distance between two sets of features (Heusel et al. 2017, equation 6), exact and without a matrix root.

    FD = |m1 - m2|² + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

With A, B the centred features over sqrt(N - 1), S1 = AᵀA and S2 = BᵀB, the last trace is the sum of the singular values
of A Bᵀ: [N, M] instead of [D, D]. For 240 rows of 1,280 that takes 4 ms; the library's square root takes seconds. The
distance falls with N (it is biased): compare equal sizes only.
"""

from __future__ import annotations

import math

import torch

from dfu_mlflow.metrics.gram import Gram, comparable_features

TOLERANCE = 1e-7
"""Relative error up to which the quicker way is taken where N > D."""


def frechet_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Frechet distance of features real [N, D] and fake [M, D], covariances unbiased (divided by N - 1).

    Raises:
        UserError: for features that cannot be compared.
    """
    real, fake = comparable_features(real, fake)
    shift = real.mean(0) - fake.mean(0)
    a, b = _scaled(real), _scaled(fake)
    without = float(shift.square().sum() + a.square().sum() + b.square().sum())
    product = _compact(a) @ _compact(b).T
    if min(len(a), len(b)) > a.shape[1]:
        root_trace, error = _root_trace_by_squares(product)
        distance = without - 2 * root_trace
        if 2 * error <= TOLERANCE * distance:
            return distance
    return max(0.0, without - 2 * float(torch.linalg.svdvals(product).sum()))


def frechet_from_gram(gram: Gram) -> float:
    """The same from inner products alone: what resampling uses, because a selection of rows costs no new products."""
    n, m = gram.cross.shape
    shift = gram.real.mean() + gram.fake.mean() - 2 * gram.cross.mean()
    trace_real = (gram.real.diagonal().sum() - n * gram.real.mean()) / (n - 1)
    trace_fake = (gram.fake.diagonal().sum() - m * gram.fake.mean()) / (m - 1)
    centred = gram.cross - gram.cross.mean(0, keepdim=True) - gram.cross.mean(1, keepdim=True) + gram.cross.mean()
    root_trace = torch.linalg.svdvals(centred).sum() / ((n - 1) * (m - 1)) ** 0.5
    return _not_negative(shift + trace_real + trace_fake - 2 * root_trace)


def _root_trace_by_squares(product: torch.Tensor) -> tuple[float, float]:
    """Sum of the singular values from the eigenvalues of the squared matrix, and how far off it may be.

    A third of the time of the singular values (1.1 s against 3.3 s at 2,048). An eigenvalue v is off by some roundings
    of the largest one, d, so its root by d / (2 sqrt(v)), or sqrt(d) where v is as small: too much where the features
    do not fill their space, and the caller then takes the singular values.
    """
    squares = torch.linalg.eigvalsh(product @ product.T).clamp(min=0)
    rounding = 16 * torch.finfo(torch.float64).eps * squares[-1]
    error = torch.minimum(rounding.sqrt(), rounding / (2 * squares.sqrt()))
    return float(squares.sqrt().sum()), float(error.sum())


def _scaled(features: torch.Tensor) -> torch.Tensor:
    centred = features - features.mean(0)
    return centred / math.sqrt(len(features) - 1)


def _compact(centred: torch.Tensor) -> torch.Tensor:
    """A matrix with the same AᵀA and at most D rows: the R of a QR decomposition where N > D."""
    if centred.shape[0] <= centred.shape[1]:
        return centred
    compact: torch.Tensor = torch.linalg.qr(centred, mode="r").R
    return compact


def _not_negative(distance: torch.Tensor) -> float:
    """Rounding leaves about -1e-12 for equal sets; the distance itself cannot be negative."""
    return max(0.0, float(distance))
