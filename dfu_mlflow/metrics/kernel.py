"""Kernel distance (KID, Binkowski et al. 2018, section 3): squared MMD under the cubic polynomial kernel, unbiased.

All pairs are used, no random subsets: the estimate is the mean of what subsets scatter around. It is zero in the mean
for equal distributions, may be negative, and does not depend on N in the mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dfu_mlflow.metrics.gram import Gram, gram

Kernel = Callable[[Gram], Gram]
"""Inner products -> similarities."""


def kernel_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Unbiased squared MMD of features real [N, D] and fake [M, D].

    Raises:
        UserError: for features that cannot be compared.
    """
    return kernel_from_gram(gram(real, fake))


def cubic_kernel(gram: Gram) -> Gram:
    """k(x, y) = (x·y / D + 1)³ in place of each inner product."""
    real, fake, cross = ((part / gram.dimension + 1) ** 3 for part in (gram.real, gram.fake, gram.cross))
    return Gram(real, fake, cross, gram.dimension)


def kernel_from_gram(gram: Gram, kernel: Kernel = cubic_kernel) -> float:
    """The same from inner products, under any kernel."""
    similarities = kernel(gram)
    return float(_within(similarities.real) + _within(similarities.fake) - 2 * similarities.cross.mean())


def paired_kernel_from_gram(gram: Gram, kernel: Kernel = cubic_kernel) -> float:
    """For rows i that show the same subject on both sides (a photograph and its reconstruction), N = M.

    The cross term leaves out the pairs (i, i) as well: kept, their likeness would drag the distance below zero. This is
    the U-statistic of Gretton et al. 2012, equation 4.
    """
    similarities = kernel(gram)
    return float(_within(similarities.real) + _within(similarities.fake) - 2 * _within(similarities.cross))


def _within(kernel: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of different rows."""
    n = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1))
