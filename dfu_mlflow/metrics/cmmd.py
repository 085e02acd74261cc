"""CMMD (Jayasumana et al. 2024, section 4): squared MMD of CLIP embeddings under a Gaussian kernel, times 1,000.

The U-statistic is taken (Gretton et al. 2012, equation 3), not the authors' V-statistic, so that equal distributions
give zero in the mean at every N. On unit vectors with bandwidth 10 the kernel is almost linear: the figure is nearly 10
times the squared distance of the means, and nearly blind to lost spread. Read it beside `recall` and `coverage`.
"""

from __future__ import annotations

import torch

from dfu_mlflow.metrics.gram import Gram, gram
from dfu_mlflow.metrics.intervals import Replicates, kernel_replicates
from dfu_mlflow.metrics.kernel import kernel_from_gram, paired_kernel_from_gram
from dfu_mlflow.metrics.metric import Metric
from dfu_mlflow.metrics.pair import Pair

BANDWIDTH = 10.0
SCALE = 1000.0


def cmmd_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """CMMD of features real [N, D] and fake [M, D] of any length.

    Raises:
        UserError: for features that cannot be compared.
    """
    return kernel_from_gram(gram(real, fake), gaussian_kernel)


def gaussian_kernel(gram: Gram) -> Gram:
    """1000 exp(-|x - y|² / 2 s²) of the unit vectors in place of each inner product: |x - y|² = 2 - 2 cos(x, y)."""
    lengths = [side.diagonal().clamp(min=1e-24).sqrt() for side in (gram.real, gram.fake)]

    def kernel(products: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return SCALE * torch.exp((products / (left[:, None] * right) - 1) / BANDWIDTH**2)

    real, fake = lengths
    return Gram(
        kernel(gram.real, real, real), kernel(gram.fake, fake, fake), kernel(gram.cross, real, fake), gram.dimension
    )


def _values(pair: Pair) -> dict[str, float]:
    return {"cmmd": kernel_from_gram(pair.products, gaussian_kernel)}


def _paired_values(pair: Pair) -> dict[str, float]:
    return {"cmmd": paired_kernel_from_gram(pair.products, gaussian_kernel)}


def _replicates(pair: Pair) -> dict[str, Replicates]:
    return {"cmmd": kernel_replicates(pair.products, pair.patients, gaussian_kernel)}


CMMD = Metric({"cmmd": "smaller"}, _values, _replicates, ("cmmd",), ("cmmd",), ("cmmd",), _paired_values)
