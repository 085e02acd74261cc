"""The sample grids of a run on disk, so that a resumed run's report shows all its epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

MAX_WIDTH_PX = 2048
"""Wider grids are shrunk: thirty epochs of eight pictures of 1,024 px would be 780 MB a class in the report."""


def fitting(pixels: np.ndarray) -> Image.Image:
    """A grid uint8 [H, W, 3], shrunk to `MAX_WIDTH_PX` where it is wider."""
    picture = Image.fromarray(pixels)
    if picture.width > MAX_WIDTH_PX:
        height = round(picture.height * MAX_WIDTH_PX / picture.width)
        picture = picture.resize((MAX_WIDTH_PX, height), Image.Resampling.LANCZOS)
    return picture


class Album:
    """Grids as `SHOWN-CLASS ID-EPOCH.png`.

    Args:
        folder: made when the first grid is kept.
        classes: labels; a class id is a position here.
    """

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.folder = folder
        self.classes = tuple(classes)

    def keep(self, shown: str, epoch: int, grids: Mapping[str, np.ndarray]) -> None:
        """Store grids uint8 [H, W, 3] by class label; `shown` is `live` or `ema`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for label, pixels in grids.items():
            number = self.classes.index(label)
            fitting(pixels).save(self.folder / f"{shown}-{number:03d}-{epoch:04d}.png")

    def grids(self, shown: str) -> dict[str, dict[int, np.ndarray]]:
        """Class label -> epoch -> grid. Epoch 0 has live weights only: the untouched base has no average."""
        found: dict[str, dict[int, np.ndarray]] = {}
        for number, label in enumerate(self.classes):
            files = [self.folder / f"live-{number:03d}-0000.png", *self.folder.glob(f"{shown}-{number:03d}-*.png")]
            found[label] = {
                int(path.stem.rsplit("-", 1)[1]): np.asarray(Image.open(path).convert("RGB"))
                for path in files
                if path.is_file()
            }
        return found
