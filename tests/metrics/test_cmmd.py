"""CMMD: the authors' formula without its bias, and what it is blind to."""

import pytest
import torch

from dfu_mlflow.metrics.cmmd import cmmd_distance, gaussian_kernel
from dfu_mlflow.metrics.gram import gram
from dfu_mlflow.metrics.kernel import paired_kernel_from_gram
from dfu_mlflow.metrics.neighbours import neighbour_figures


def unit(rows: int, width: int, seed: int, spread: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """Unit vectors scattered about one direction."""
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    drawn[:, 0] += 10.0
    drawn[:, 1] += shift
    return torch.nn.functional.normalize(drawn)


def test_equals_the_formula_pair_by_pair() -> None:
    real, fake = unit(12, 5, 0), unit(9, 5, 1, shift=3.0)

    def kernel(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.exp(-torch.cdist(left, right).square() / (2 * 10.0**2))

    within = [(kernel(side, side).sum() - len(side)) / (len(side) * (len(side) - 1)) for side in (real, fake)]
    expected = 1000 * (within[0] + within[1] - 2 * kernel(real, fake).mean())
    assert cmmd_distance(real, fake) == pytest.approx(float(expected), rel=1e-9)
    assert cmmd_distance(real * 7, fake * 0.3) == pytest.approx(float(expected), rel=1e-9)


def test_unbiased_where_the_authors_statistic_is_not() -> None:
    values = torch.tensor([cmmd_distance(unit(20, 16, seed), unit(20, 16, 1000 + seed)) for seed in range(150)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 150**0.5
    biased = gaussian_kernel(gram(unit(20, 16, 0), unit(20, 16, 1)))
    assert float(biased.real.mean() + biased.fake.mean() - 2 * biased.cross.mean()) > 2 * float(values.std())


def test_nearly_ten_times_the_squared_shift_and_blind_to_lost_spread() -> None:
    real, shifted, narrow = unit(300, 16, 0), unit(300, 16, 1, shift=4.0), unit(300, 16, 2, spread=0.5)
    way = float((real.mean(0) - shifted.mean(0)).square().sum())
    assert cmmd_distance(real, shifted) == pytest.approx(10 * way, rel=0.05)
    assert cmmd_distance(real, narrow) < cmmd_distance(real, shifted) / 10
    assert neighbour_figures(real, narrow)["recall"] < 0.3


def test_a_reconstruction_is_compared_without_its_own_pairs() -> None:
    real = unit(40, 16, 0)
    assert paired_kernel_from_gram(gram(real, real), gaussian_kernel) == pytest.approx(0.0, abs=1e-9)
