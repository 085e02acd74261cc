"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dfu_mlflow.config.schema import TrainConfig
from dfu_mlflow.errors import UserError


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
