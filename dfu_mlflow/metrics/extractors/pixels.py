"""What can be read from pixels without a network: the pixels themselves, colour statistics, and value-range signs."""

from __future__ import annotations

import torch

from dfu_mlflow.metrics.extractors.base import NetworkExtractor

PIXELS_SIZE_PX = 64
BINS = 8
"""Levels a channel of the joint colour histogram."""
JUMP = 180.0
"""Difference of neighbouring pixels, of 255, that wrapped values show everywhere and photographs almost nowhere."""
STATISTICS = ("saturation", "clipped_share", "contrast", "brightness")


def pixel_values(device: torch.device | None = None) -> NetworkExtractor:
    """The pixels at 64 px, 0 to 255, as [N, 12288]: channel, row, column."""
    extractor = NetworkExtractor("pixels", "1", PIXELS_SIZE_PX, 3 * PIXELS_SIZE_PX**2)
    return extractor.attach(torch.nn.Flatten(), device or torch.device("cpu"), 0.0, 1.0)


def colour_statistics(size_px: int, device: torch.device | None = None) -> NetworkExtractor:
    """Per picture, [N, 4]: mean saturation (HSV), share of clipped pixels, RMS contrast, brightness.

    A pixel is clipped when a channel is 0 or 255; brightness is the mean of the luma (ITU-R BT.601) over 255, contrast
    its deviation (Peli 1990). All are in [0, 1]. Give the size the photographs have: resizing changes the first three.
    """
    extractor = NetworkExtractor("colour", "2", size_px, len(STATISTICS))
    return extractor.attach(_Colour(), device or torch.device("cpu"), 0.0, 1.0)


def value_signs(size_px: int, device: torch.device | None = None) -> NetworkExtractor:
    """Per picture, [N, 514]: jumps between neighbours a line of pixels, highest value over 255, joint colour histogram.

    What `value_range.require_photographic` judges by. The histogram has 8 x 8 x 8 cells.
    """
    extractor = NetworkExtractor("value_signs", "1", size_px, 2 + BINS**3)
    return extractor.attach(_Signs(), device or torch.device("cpu"), 0.0, 1.0)


class _Colour(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        high, low = pixels.amax(1), pixels.amin(1)
        saturation = torch.where(high > 0, (high - low) / high.clamp(min=1e-6), 0.0)
        clipped = ((high >= 255) | (low <= 0)).float()
        luma = (pixels * pixels.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1) / 255
        contrast, brightness = luma.flatten(1).std(1, correction=0), luma.mean((1, 2))
        return torch.stack([saturation.mean((1, 2)), clipped.mean((1, 2)), contrast, brightness], 1)


class _Signs(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        # a line, not a share: the edges of wrapped areas are lines, whatever the resolution
        jumps = [(pixels.diff(dim=axis).abs() > JUMP).float().sum(axis).mean((1, 2)) for axis in (2, 3)]
        levels = (pixels * (BINS / 256)).long().clamp(max=BINS - 1)
        cells = ((levels[:, 0] * BINS + levels[:, 1]) * BINS + levels[:, 2]).flatten(1)
        one = torch.full(cells.shape, 1 / cells.shape[1], device=pixels.device)
        histogram = torch.zeros(len(cells), BINS**3, device=pixels.device).scatter_add_(1, cells, one)
        high = pixels.amax((1, 2, 3)) / 255
        return torch.cat([torch.stack([(jumps[0] + jumps[1]) / 2, high], 1), histogram], 1)
