"""Prior reliance on features whose truth is known."""

from __future__ import annotations

import torch

from dfu_mlflow.diagnosis.prior_reliance import reliance
from dfu_mlflow.types import Estimate

WIDTH = 200


def measured(gone: float, seed: int) -> Estimate:
    """24 pictures that went the share `gone` of the way to 60 photographs, each with scatter of its own."""
    source = torch.Generator().manual_seed(seed)
    way = torch.ones(WIDTH, dtype=torch.float64) * 0.3
    before = torch.randn(24, WIDTH, generator=source, dtype=torch.float64)
    now = before + gone * way + 0.5 * torch.randn(24, WIDTH, generator=source, dtype=torch.float64)
    real = way + torch.randn(60, WIDTH, generator=source, dtype=torch.float64)
    return reliance(before, now, real, seed)


def test_an_untouched_base_relies_on_its_prior_alone() -> None:
    source = torch.Generator().manual_seed(0)
    before, real = torch.randn(24, 8, generator=source).double(), 3 + torch.randn(40, 8, generator=source).double()
    assert reliance(before, before, real, 0) == Estimate(1.0, 1.0, 1.0)


def test_the_planted_share_is_found_without_bias_and_inside_the_interval() -> None:
    """Without the halves the noise of the means would lengthen the way, and show 0.82 for 0.7 not gone."""
    found = [measured(0.3, seed) for seed in range(200)]
    assert abs(sum(each.value for each in found) / 200 - 0.7) < 0.02
    held = sum(each.low is not None and each.high is not None and each.low <= 0.7 <= each.high for each in found)
    assert held / 200 >= 0.9


def test_pictures_that_moved_elsewhere_still_rely_on_the_prior() -> None:
    source = torch.Generator().manual_seed(1)
    before, real = torch.randn(24, 8, generator=source).double(), torch.randn(40, 8, generator=source).double()
    aside = before + torch.tensor([0.0, 5.0] + [0.0] * 6).double()
    real = real + torch.tensor([5.0] + [0.0] * 7).double()
    assert reliance(before, aside, real, 0).value > 0.8
