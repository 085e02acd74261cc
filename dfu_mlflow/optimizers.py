"""Optimizers by name."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from dfu_mlflow.config.schema import TrainConfig
from dfu_mlflow.errors import UserError

SMALL = 4096
"""Weights of fewer elements keep 32-bit moments in 8-bit AdamW (bitsandbytes' `min_8bit_size`)."""
BLOCK = 256
"""Elements that share one float32 scale there."""


def state_bytes(shape: torch.Size, optimizer: str) -> float:
    """Bytes that an optimizer keeps for one float32 weight; test_memory.py holds them against the optimizers'.

    Adafactor keeps sums over the last and over the last but one axis: of a 3 x 3 convolution that is two thirds.
    """
    count = shape.numel()
    if optimizer == "adafactor":
        return 4.0 * (count / shape[-1] + count / shape[-2] if len(shape) > 1 else count)
    if optimizer == "adamw_8bit" and count >= SMALL:
        return 2.0 * (count + 4.0 * math.ceil(count / BLOCK))
    return 8.0 * count


def build_optimizer(weights: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimizer over the weights, in their order.

    Raises:
        UserError: for 8-bit AdamW where bitsandbytes is not installed.
    """
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(weights, lr=config.learning_rate, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            weights, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay, fused=True
        )
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(
            "--train.optimizer adamw_8bit needs the package bitsandbytes, which is not installed: "
            "pip install bitsandbytes, or use adamw or adafactor"
        ) from None
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        weights, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay
    )
    return optimizer
