"""What an extractor is, and the part that all of them share: checks, resizing, batches.

Resizing is part of a metric's definition (Parmar et al. 2022, "On aliased resizing"): every picture, larger or smaller,
is resized as Pillow's antialiased bicubic does in floating point, without rounding back to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional

from dfu_mlflow.errors import UserError

RESIZE = "bicubic-antialiased"
Level = float | tuple[float, float, float]
IMAGENET: tuple[Level, Level] = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""ImageNet's mean and deviation by channel, in pixel values."""


class Extractor(Protocol):
    """A frozen network.

    Attributes:
        name: e.g. `efficientnet_lite0`.
        dimension: D, features a picture.
        size_px: side of the square that pictures are resized to.
        identity: name, weights' hash, size and resize rule.
    """

    @property
    def name(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    @property
    def size_px(self) -> int: ...
    @property
    def identity(self) -> str: ...

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features float64 [N, D] on the CPU of images uint8 [N, H, W, 3], 0 to 255.

        Raises:
            UserError: for another type, shape or value range.
        """
        ...


class NetworkExtractor:
    """An `Extractor` around a network that takes float32 [B, 3, S, S] and gives [B, D]."""

    def __init__(self, name: str, weights_hash: str, size_px: int, dimension: int) -> None:
        self.name, self.size_px, self.dimension = name, size_px, dimension
        self.identity = f"{name}@{weights_hash[:8]} {size_px}px {RESIZE}"
        self._network: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._device = torch.device("cpu")
        self._centre, self._scale, self._batch_size = torch.zeros(1), torch.ones(1), 32

    def attach(self, network: torch.nn.Module, device: torch.device, centre: Level, scale: Level) -> NetworkExtractor:
        """Set the network and its input range, (pixel - centre) / scale, in pixel values, alike or by channel."""
        self._network = network.to(device).to(memory_format=torch.channels_last).eval()
        for weight in network.parameters():  # TorchScript has no `requires_grad_` of its own
            weight.requires_grad_(False)
        self._device = device
        self._centre, self._scale = (torch.tensor(level, device=device).reshape(-1, 1, 1) for level in (centre, scale))
        return self

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See `Extractor`."""
        assert self._network is not None
        check_images(images)
        batches = []
        for batch in images.split(self._batch_size):
            pixels = resized(batch.to(self._device), self.size_px).sub_(self._centre).div_(self._scale)
            with torch.inference_mode():
                batches.append(self._network(pixels.contiguous(memory_format=torch.channels_last)).double().cpu())
        return torch.cat(batches) if batches else torch.empty(0, self.dimension, dtype=torch.float64)


def check_images(images: torch.Tensor) -> None:
    """Refuse what is not uint8 [N, H, W, 3]: wrapped or rescaled pictures are the classic way to a wrong FID.

    Raises:
        UserError: saying what was given.
    """
    if images.dtype != torch.uint8:
        span = f", values {float(images.min()):.3g} to {float(images.max()):.3g}" if images.numel() else ""
        raise UserError(f"pictures for metrics are {images.dtype}{span}: torch.uint8, 0 to 255, is needed")
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"pictures for metrics have shape {list(images.shape)}: [N, height, width, 3] is needed")


def resized(images: torch.Tensor, size_px: int) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, size_px, size_px], 0 to 255, resized as clean-fid does."""
    pixels = images.permute(0, 3, 1, 2).float()
    if pixels.shape[-2:] != (size_px, size_px):
        pixels = functional.interpolate(pixels, (size_px, size_px), mode="bicubic", antialias=True, align_corners=False)
    return pixels.clamp(0, 255)
