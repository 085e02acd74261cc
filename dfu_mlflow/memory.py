"""Estimated peak memory and disk of a run, by part, from shapes alone (modules on the meta device)."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfu_mlflow.activations import activation_bytes
from dfu_mlflow.base.adapters import attach, store_frozen
from dfu_mlflow.base.published import meta_modules
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.memory_figures import remembered
from dfu_mlflow.optimizers import state_bytes

GIB = 2**30


def count(module: nn.Module) -> int:
    """Number of weights."""
    return sum(weight.numel() for weight in module.parameters())


@dataclass(frozen=True)
class TrainingMemory:
    """What one process's training step holds, in bytes, and what is trained.

    For one process: activations are those of the whole `train.batch_size`, which several processes would share. The
    parts do not all peak together where gradients are kept: there the sum is an upper bound.

    Attributes:
        weights: of the base's UNet, in number.
        trained: of them and of its adapters, those that learn.
        trainable_fraction: trained over all, adapters counted in.
        unet, gradients, optimizer, ema, activations: bytes.
        checkpoint: bytes of one on disk.
    """

    weights: int
    trained: int
    trainable_fraction: float
    unet: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    checkpoint: float


def training_memory(config: RunConfig, source: str) -> TrainingMemory:
    """Estimate them.

    Args:
        source: of the base, as `resolve_base` gives it.
    """
    modules = meta_modules(source)
    unet: Any = modules["unet"]
    vae: Any = modules["vae"]
    base_weights = count(unet)
    edge = math.ceil(config.data.resolution_px / 2 ** (len(vae.config.block_out_channels) - 1))
    weights = _attached(unet, config)
    trained = sum(weight.numel() for weight in weights)
    return TrainingMemory(
        weights=base_weights,
        trained=trained,
        trainable_fraction=trained / count(unet),
        unet=float(sum(weight.nbytes for weight in unet.parameters())),
        gradients=_gradient_bytes(weights, config),
        optimizer=_optimizer_bytes(weights, config),
        ema=4.0 * trained if config.ema.enabled else 0.0,
        activations=remembered(config.data, _facts(unet, edge, config), lambda: activation_bytes(unet, edge, config)),
        checkpoint=_checkpoint_bytes(weights, config),
    )


def check_disk(config: RunConfig, source: str) -> None:
    """Refuse to start where the checkpoints will not fit.

    Raises:
        UserError: saying how much is needed and how much is free.
    """
    if not Path(source).is_dir():  # counting a real one's weights takes seconds; `--dry-run` does it
        return
    unet = meta_modules(source)["unet"]
    needed = kept_checkpoints(config) * _checkpoint_bytes(_attached(unet, config), config)
    place, free = free_bytes(config.output_dir)
    if free < needed:
        raise UserError(
            f"--output_dir {config.output_dir} needs {needed / GIB:.2f} GiB for {kept_checkpoints(config)} "
            f"checkpoints, {place} has {free / GIB:.2f} GiB free: free some, set --output_dir elsewhere or a smaller "
            "--checkpoint.keep_last"
        )


def check_output_folder(folder: Path) -> None:
    """Before anything is computed that would have to be written there; nothing is made yet.

    Raises:
        UserError: where that cannot be.
    """
    place = nearest(folder)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {folder} cannot be written: {place} is no folder that you may write to")


def kept_checkpoints(config: RunConfig) -> int:
    """Checkpoints on disk at the worst moment: the newest ones, the best one and the one being written."""
    return config.checkpoint.keep_last + 2


def free_bytes(folder: Path) -> tuple[Path, int]:
    """The nearest place that exists, and what is free there."""
    place = nearest(folder)
    return place, shutil.disk_usage(place).free


def nearest(path: Path) -> Path:
    """The path, or the nearest above it that exists."""
    place = path.absolute()
    while not os.path.lexists(place):
        place = place.parent
    return place


def _facts(unet: Any, edge: int, config: RunConfig) -> dict[str, Any]:
    """What a training step's activations depend on."""
    train = config.train
    step = [train.batch_size, train.gradient_checkpointing, train.mixed_precision, train.fused_backward]
    adapter = config.adapter.model_dump(mode="json")
    return {"step": step, "unet": dict(unet.config), "edge": edge, "adapter": adapter, "device": config.device}


def _attached(unet: Any, config: RunConfig) -> list[nn.Parameter]:
    """Give a UNet of shapes the run's adapters and precisions; what learns."""
    with torch.device("meta"):
        weights = list(attach(unet, config.adapter, seed=0).values())
        store_frozen(unet, config.adapter)
    return weights


def _gradient_bytes(weights: list[nn.Parameter], config: RunConfig) -> float:
    """All gradients; stepping inside the backward pass, none: the one that exists counts among the activations.

    The perceptual term's share of the gradient is measured once an epoch, with every gradient at once.
    """
    if config.train.fused_backward and not config.loss.perceptual_loss.enabled:
        return 0.0
    return 4.0 * sum(weight.numel() for weight in weights)


def _optimizer_bytes(weights: list[nn.Parameter], config: RunConfig) -> float:
    return sum(state_bytes(weight.shape, config.train.optimizer) for weight in weights)


def _checkpoint_bytes(weights: list[nn.Parameter], config: RunConfig) -> float:
    kept = 8.0 if config.ema.enabled else 4.0
    return kept * sum(weight.numel() for weight in weights) + _optimizer_bytes(weights, config)
