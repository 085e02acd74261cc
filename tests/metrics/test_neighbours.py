"""Precision, recall, density, coverage: parity with prdc, and what they see that the Frechet distance does not."""

import pytest
import torch
from prdc import compute_prdc

from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.frechet import frechet_distance
from dfu_mlflow.metrics.neighbours import neighbour_figures


def gaussian(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "m", "width"), [(60, 60, 8), (200, 120, 96), (40, 150, 300)])
@pytest.mark.parametrize("nearest", [3, 5])
def test_equals_prdc_exactly(n: int, m: int, width: int, nearest: int, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        real, fake = gaussian(n, width, seed), gaussian(m, width, 100 + seed) * 1.1 + 0.05
        theirs = compute_prdc(real.numpy(), fake.numpy(), nearest)
        found = neighbour_figures(real, fake, nearest)
        assert found == {name: pytest.approx(float(value), abs=1e-12) for name, value in theirs.items()}
    capsys.readouterr()


def test_equals_prdc_with_copies_among_the_generated(capsys: pytest.CaptureFixture[str]) -> None:
    real = gaussian(80, 16, 0)
    fake = torch.cat([gaussian(60, 16, 1), real[:20] + 1e-9])
    theirs = compute_prdc(real.numpy(), fake.numpy(), 5)
    assert neighbour_figures(real, fake) == {name: pytest.approx(float(value)) for name, value in theirs.items()}
    capsys.readouterr()


def test_sets_apart_and_sets_alike() -> None:
    real = gaussian(100, 8, 0)
    assert set(neighbour_figures(real, gaussian(100, 8, 1) + 100).values()) == {0.0}
    alike = neighbour_figures(real, gaussian(100, 8, 2))
    assert alike["density"] == pytest.approx(1.0, abs=0.3)
    assert alike["coverage"] > 0.85


def test_mode_collapse_shows_in_coverage_while_the_frechet_distance_is_at_its_floor() -> None:
    """Real rows are normal; the collapsed generator knows 2 D spots at ±sqrt(D) on the axes: same mean and spread."""
    width = 6
    real, others = gaussian(240, width, 0), gaussian(240, width, 1)
    spots = torch.cat([torch.eye(width), -torch.eye(width)]).double() * width**0.5
    collapsed = spots.repeat(20, 1) + 0.02 * gaussian(240, width, 2)
    floor, found = neighbour_figures(real, others), neighbour_figures(real, collapsed)
    assert frechet_distance(real, collapsed) < 1.2 * frechet_distance(real, others)
    assert floor["coverage"] > 0.9
    assert found["coverage"] < 0.3


def test_small_sides_take_the_neighbours_they_have() -> None:
    found = neighbour_figures(gaussian(4, 3, 0), gaussian(4, 3, 1), nearest=5)
    assert all(0 <= value <= 1 for value in found.values())


def test_refuses_values_that_are_not_finite() -> None:
    with pytest.raises(UserError, match="not finite"):
        neighbour_figures(gaussian(10, 3, 0), torch.full((10, 3), torch.inf))
