"""Estimated peak memory and disk of a run, by part, from shapes alone (modules on the meta device)."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfu_mlflow.base.adapters import attach
from dfu_mlflow.base.published import meta_modules
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.errors import UserError

GIB = 2**30
TOKENS = 77
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.1, "adafactor": 0.1}
"""State bytes a trained weight: two float32 moments; two 8-bit ones with block scales; row and column means."""


def count(module: nn.Module) -> int:
    """Number of weights."""
    return sum(weight.numel() for weight in module.parameters())


def memory_plan(config: RunConfig, source: str) -> dict[str, Any]:
    """Weights, trainable share, peak memory by part [GiB] on the device and beside it, and checkpoint size [GiB].

    For one process: activations are those of the whole `train.batch_size`, which several processes would share.

    Args:
        source: as `resolve_base` gives it.
    """
    modules = meta_modules(source)
    unet = modules["unet"]
    base_weights = count(unet)
    trained = _trained(unet, config)
    ema_bytes = 4.0 * trained if config.ema.enabled else 0.0
    parts = {
        "UNet": 4.0 * count(unet),
        "gradients": 4.0 * trained,
        "optimizer": OPTIMIZER_BYTES[config.train.optimizer] * trained,
        "EMA": 0.0 if config.ema.on_host else ema_bytes,
        "autoencoder": 4.0 * count(modules["vae"]),
        "activations": _activation_bytes(unet, modules["vae"], config),
    }
    host = {
        "EMA": ema_bytes if config.ema.on_host else 0.0,
        "text encoders, until prompts are encoded": 4.0
        * sum(count(modules[name]) for name in ("text_encoder", "text_encoder_2")),
    }
    return {
        "unet_weights": base_weights,
        "trained_weights": trained,
        "trainable_fraction": trained / count(unet),
        "memory_gib": {name: size / GIB for name, size in parts.items()},
        "host_memory_gib": {name: size / GIB for name, size in host.items() if size},
        "checkpoint_gib": _checkpoint_bytes(trained, config) / GIB,
    }


def check_disk(config: RunConfig, source: str) -> None:
    """Refuse to start where the checkpoints will not fit.

    Raises:
        UserError: saying how much is needed and how much is free.
    """
    if not Path(source).is_dir():  # counting a real one's weights takes seconds; `--dry-run` does it
        return
    unet = meta_modules(source)["unet"]
    needed = kept_checkpoints(config) * _checkpoint_bytes(_trained(unet, config), config)
    place, free = free_bytes(config.output_dir)
    if free < needed:
        raise UserError(
            f"--output_dir {config.output_dir} needs {needed / GIB:.2f} GiB for {kept_checkpoints(config)} "
            f"checkpoints, {place} has {free / GIB:.2f} GiB free: free some, set --output_dir elsewhere or a smaller "
            "--checkpoint.keep_last"
        )


def kept_checkpoints(config: RunConfig) -> int:
    """Checkpoints on disk at the worst moment: the newest ones, the best one and the one being written."""
    return config.checkpoint.keep_last + 2


def free_bytes(folder: Path) -> tuple[Path, int]:
    """The nearest folder that exists, and what is free there."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place, shutil.disk_usage(place).free


def _trained(unet: nn.Module, config: RunConfig) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in attach(unet, config.adapter, seed=0).values())


def _checkpoint_bytes(trained: int, config: RunConfig) -> float:
    return trained * (4.0 + OPTIMIZER_BYTES[config.train.optimizer] + (4.0 if config.ema.enabled else 0.0))


def _activation_bytes(unet: Any, vae: Any, config: RunConfig) -> float:
    """Outputs that a training forward pass keeps for the backward one, measured by running it on the meta device.

    With gradient checkpointing only what crosses the blocks is kept, and one block is recomputed at a time.
    """
    kept: dict[nn.Module, int] = {}

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and not list(module.children()):
            kept[module] = kept.get(module, 0) + output.numel()

    hooks = [module.register_forward_hook(note) for module in unet.modules()]
    with torch.device("meta"):
        _meta_forward(unet, vae, config.data.resolution_px)
    for hook in hooks:
        hook.remove()
    total = sum(kept.values())
    if config.train.gradient_checkpointing:
        blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        largest = max(sum(kept.get(module, 0) for module in block.modules()) for block in blocks)
        total = largest + total // len(blocks)
    size = 4 if config.train.mixed_precision == "no" else 2
    return float(total * size * config.train.batch_size)


def _meta_forward(unet: Any, vae: Any, resolution_px: int) -> None:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    edge = math.ceil(resolution_px / factor)
    added = {
        "text_embeds": torch.empty(
            1, unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        ),
        "time_ids": torch.empty(1, 6),
    }
    unet(
        torch.empty(1, unet.config.in_channels, edge, edge),
        torch.tensor([1]),
        encoder_hidden_states=torch.empty(1, TOKENS, unet.config.cross_attention_dim),
        added_cond_kwargs=added,
    )
