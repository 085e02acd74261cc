"""Frechet distance: closed forms, invariances, parity with two libraries."""

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.frechet import frechet_distance, frechet_from_gram
from dfu_mlflow.metrics.gram import gram

SIZES = [(40, 50, 96), (300, 260, 96), (60, 300, 96)]


def gaussian(rows: int, width: int, seed: int) -> torch.Tensor:
    draw = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw * torch.linspace(0.2, 2.0, width, dtype=torch.float64)


@pytest.mark.parametrize(("n", "m", "width"), SIZES)
def test_equals_torch_fidelity(n: int, m: int, width: int) -> None:
    real, fake = gaussian(n, width, 0), gaussian(m, width, 1) * 1.2 + 0.1
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(real), fid_features_to_statistics(fake), verbose=False
    )["frechet_inception_distance"]
    assert frechet_distance(real, fake) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(("n", "m", "width"), SIZES)
@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated:DeprecationWarning")
def test_equals_clean_fid(n: int, m: int, width: int) -> None:
    real, fake = gaussian(n, width, 0).numpy(), gaussian(m, width, 1).numpy() * 1.2 + 0.1
    moments = [(side.mean(0), np.cov(side, rowvar=False)) for side in (real, fake)]
    theirs = cleanfid.frechet_distance(*moments[0], *moments[1])
    assert frechet_distance(torch.from_numpy(real), torch.from_numpy(fake)) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(("n", "m", "width"), SIZES)
def test_inner_products_give_the_same(n: int, m: int, width: int) -> None:
    real, fake = gaussian(n, width, 2), gaussian(m, width, 3) + 5.0
    assert frechet_from_gram(gram(real, fake)) == pytest.approx(frechet_distance(real, fake), rel=1e-9)


@pytest.mark.parametrize(("n", "width"), [(30, 80), (80, 30)])
def test_shifting_a_set_costs_the_squared_shift(n: int, width: int) -> None:
    real, shift = gaussian(n, width, 4), torch.linspace(-1, 1, width, dtype=torch.float64)
    assert frechet_distance(real, real + shift) == pytest.approx(float(shift.square().sum()), rel=1e-9)
    assert frechet_distance(real, real) == pytest.approx(0.0, abs=1e-9)


def test_scaling_a_set_costs_its_spread() -> None:
    """S2 = s² S1 about the same mean: FD = (s - 1)² tr S1."""
    real = gaussian(50, 20, 5)
    scaled = (real - real.mean(0)) * 3.0 + real.mean(0)
    assert frechet_distance(real, scaled) == pytest.approx(4.0 * float(real.var(0).sum()), rel=1e-9)


def test_symmetric_and_blind_to_rotation_and_order() -> None:
    real, fake = gaussian(40, 60, 6), gaussian(35, 60, 7) + 0.3
    rotation = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(8), dtype=torch.float64)).Q
    value = frechet_distance(real, fake)
    assert frechet_distance(fake, real) == pytest.approx(value, rel=1e-9)
    assert frechet_distance(real @ rotation, fake.flip(0) @ rotation) == pytest.approx(value, rel=1e-9)


def test_falls_with_the_number_of_pictures() -> None:
    """The bias that makes equal sizes necessary."""
    small = frechet_distance(gaussian(40, 60, 9), gaussian(40, 60, 10))
    large = frechet_distance(gaussian(400, 60, 9), gaussian(400, 60, 10))
    assert large < small / 4


def test_features_that_do_not_fill_their_space_get_the_exact_way() -> None:
    """N > D with dead and nearly dead columns: squares lose them, singular values do not."""
    real, fake = gaussian(300, 40, 11), gaussian(300, 40, 12) * 1.01
    for side in (real, fake):
        side[:, 10:30] = 0.0
        side[:, 30:] *= 1e-9
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(real), fid_features_to_statistics(fake), verbose=False
    )["frechet_inception_distance"]
    assert frechet_distance(real, fake) == pytest.approx(theirs, rel=1e-6)
    assert frechet_distance(real, fake) == pytest.approx(frechet_distance(real[:, :10], fake[:, :10]), rel=1e-9)
    assert frechet_distance(real, real) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (torch.zeros(1, 4), torch.zeros(5, 4), "at least 2 rows"),
        (torch.zeros(5, 4), torch.zeros(5, 3), "4 wide, generated ones 3"),
        (torch.zeros(5, 4), torch.full((5, 4), float("nan")), "not finite"),
    ],
)
def test_refuses_what_cannot_be_compared(real: torch.Tensor, fake: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        frechet_distance(real, fake)
