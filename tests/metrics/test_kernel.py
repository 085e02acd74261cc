"""Kernel distance: parity with torch-fidelity, unbiasedness, pairs."""

import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric, mmd2

from dfu_mlflow.metrics.gram import gram
from dfu_mlflow.metrics.kernel import cubic_kernel, kernel_distance, kernel_from_gram, paired_kernel_from_gram


def gaussian(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "width"), [(40, 96), (200, 32)])
def test_equals_torch_fidelity(n: int, width: int) -> None:
    real, fake = gaussian(n, width, 0), gaussian(n, width, 1) * 1.2 + 0.1
    theirs = kid_features_to_metric(real, fake, kid_subsets=1, kid_subset_size=n, verbose=False)
    expected = theirs["kernel_inception_distance_mean"]
    assert kernel_distance(real, fake) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_pairs_are_left_out_as_in_torch_fidelity() -> None:
    products = gram(gaussian(50, 20, 2), gaussian(50, 20, 2) + 0.1 * gaussian(50, 20, 3))
    kernel = cubic_kernel(products)
    theirs = mmd2(kernel.real.numpy(), kernel.cross.numpy(), kernel.fake.numpy(), mmd_est="u-statistic")
    assert paired_kernel_from_gram(products) == pytest.approx(theirs, rel=1e-9)


def test_a_reconstruction_is_not_nearer_than_nothing() -> None:
    """A set against itself: with its own pairs the estimate is dragged below zero, without them it is zero."""
    products = gram(gaussian(30, 20, 4), gaussian(30, 20, 4))
    assert paired_kernel_from_gram(products) == pytest.approx(0.0, abs=1e-12)
    assert kernel_from_gram(products) < -0.05


def test_unbiased_whatever_the_sizes() -> None:
    """Mean over 200 pairs of equal distributions: zero within four standard errors, at 15 against 40 rows."""
    values = torch.tensor([kernel_distance(gaussian(15, 8, seed), gaussian(40, 8, 1000 + seed)) for seed in range(200)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 200**0.5
    assert float(values.min()) < 0


def test_first_moment_in_closed_form() -> None:
    """Two constant sets a and b: k(a, a) + k(b, b) - 2 k(a, b) with k = (x·y / D + 1)³."""
    real, fake = torch.full((5, 2), 1.0), torch.full((7, 2), 2.0)
    assert kernel_distance(real, fake) == pytest.approx(2.0**3 + 5.0**3 - 2 * 3.0**3)
