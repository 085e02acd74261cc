"""Inverted, wrapped and unscaled pictures are refused; sound ones are not."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfu_mlflow.data.images import load_rgb
from dfu_mlflow.data.phantom import render
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.extractors.pixels import value_signs
from dfu_mlflow.metrics.value_range import range_signs, require_photographic

FUSEG = os.environ.get("DFU_FUSEG")
SIZE_PX = 64


@pytest.fixture(scope="module", params=["phantom", "fuseg"])
def photographs(request: pytest.FixtureRequest) -> torch.Tensor:
    if request.param == "phantom":
        drawn = [render(patient, 0, view, "IPR"[patient % 3]) for patient in range(60) for view in range(2)]
        return torch.from_numpy(np.stack(drawn))
    if FUSEG is None:
        pytest.skip("DFU_FUSEG does not point to the photographs")
    files = sorted(Path(FUSEG).rglob("*.jpg"))
    small = [
        Image.fromarray(load_rgb(file)).resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS) for file in files[:120]
    ]
    return torch.from_numpy(np.stack([np.array(image) for image in small]))


def twice_scaled(share: torch.Tensor) -> torch.Tensor:
    """A float picture whose values, like a decoder's, lie between the 256 levels."""
    return (share + 0.0017) * 255 * 255


BREAKS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "inverted": (lambda share: 255 - 255 * share, "look inverted"),
    "scaled to 255 twice": (twice_scaled, "look wrapped round"),
    "-1 to 1 times 255": (lambda share: (2 * share - 1) * 255, "look wrapped round"),
    "-1 to 1 times 127.5": (lambda share: (2 * share - 1) * 127.5, "look wrapped round"),
    "0 to 1 cast to bytes": (torch.round, "0 to 1 was not scaled"),
}


@pytest.mark.parametrize("kind", sorted(BREAKS))
def test_broken_pictures_are_refused(photographs: torch.Tensor, kind: str) -> None:
    damage, message = BREAKS[kind]
    broken = damage(photographs[::2].double() / 255).long().remainder(256).to(torch.uint8)
    extractor = value_signs(SIZE_PX)
    with pytest.raises(UserError, match=f"not in the value range 0 to 255 of photographs: .*{message}"):
        require_photographic(extractor(broken), extractor(photographs[1::2]))


def test_no_false_alarm_on_sets_of_twelve(photographs: torch.Tensor) -> None:
    features, generator = value_signs(SIZE_PX)(photographs), torch.Generator().manual_seed(0)
    for _ in range(200):
        order = torch.randperm(len(features), generator=generator)
        assert range_signs(features[order[:12]], features[order[12:42]]).problem is None


def test_poor_pictures_are_not_broken_ones(photographs: torch.Tensor) -> None:
    """Cartoons, blur, noise and a strong tint are what metrics are for."""
    images, extractor = photographs.double(), value_signs(SIZE_PX)
    noise = 40 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cartoon = (images / 64).round() * 64
    poor = [cartoon.mean(-1, keepdim=True) + 2 * (cartoon - cartoon.mean(-1, keepdim=True)), images + noise]
    poor += [images + torch.tensor([60.0, 0, -60.0]), images * 0.3, 255 - 0.3 * (255 - images)]
    for pictures in poor:
        shown = extractor(pictures.clamp(0, 255).round().to(torch.uint8))
        require_photographic(shown, extractor(photographs))
