"""A picture shrunk to a few cells, without its brightness and contrast: features for finding copies, no network needed.

A network's features are made to overlook what makes a copy a copy. Measured on 1,020 training phantoms of 64 px and 500
copies of them that went through the autoencoder, a fifth of the latents' deviation added as noise: 100 % have a
neighbour-gap ratio below 0.5 here and 0 % with EfficientNet-Lite0 at 96 px. Moved by a twentieth of their side: 26 %
and 1 %. Of 8, 10, 12 and 16 cells a side the fewest forgive moves best; with 5, other patients look like copies.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from dfu_mlflow.metrics.extractors.base import check_images

SIDE = 8
IDENTITY = f"pixels {SIDE}x{SIDE}, cell means, centred by channel, unit length"


def coarse_pixels(images: torch.Tensor) -> torch.Tensor:
    """Features float64 [N, 192] of images uint8 [N, H, W, 3].

    Cells are averaged, each channel's mean is taken off (brightness, colour of the light) and the rest is scaled to
    unit length (contrast); a picture of one colour is all zeros.

    Raises:
        UserError: for another type or shape.
    """
    check_images(images)
    cells = [_cells(batch) for batch in images.split(256)]
    return torch.cat(cells) if cells else torch.empty(0, 3 * SIDE * SIDE, dtype=torch.float64)


def _cells(images: torch.Tensor) -> torch.Tensor:
    shrunk = functional.interpolate(images.permute(0, 3, 1, 2).double(), (SIDE, SIDE), mode="area")
    return functional.normalize((shrunk - shrunk.mean((2, 3), keepdim=True)).flatten(1), dim=1)
