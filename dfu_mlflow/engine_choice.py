"""Which engine moves the gradients: as the launcher asks, where it does what one process does."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from torch import nn

from dfu_mlflow.base.adapters import Weights
from dfu_mlflow.config.schema import RunConfig, TrainConfig
from dfu_mlflow.engines import Engine, FusedEngine
from dfu_mlflow.errors import UserError
from dfu_mlflow.fused import BackwardOptimizer
from dfu_mlflow.ranks import uses_deepspeed, uses_fsdp
from dfu_mlflow.runtime import require_compiler
from dfu_mlflow.shards import ShardEngine, plain_accelerator
from dfu_mlflow.zero import PartitionEngine, ZeroEngine


def zero_stage() -> str:
    """DeepSpeed's stage that the launcher asks for."""
    return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")


def check_launch(train: TrainConfig, processes: int = 1) -> None:
    """Refuse what the launcher asks for and no engine does the same way as one process.

    Raises:
        UserError: naming the launch that does it.
    """
    if uses_fsdp() and os.environ.get("FSDP_VERSION", "2") != "2":
        raise UserError("of FSDP only version 2 is supported: launch with fsdp2")
    if uses_deepspeed() and zero_stage() not in ("2", "3"):
        raise UserError("of DeepSpeed's stages ZeRO-2 and ZeRO-3 are supported: launch with zero2, zero3 or ddp")
    shards = f"zero{zero_stage()}" if uses_deepspeed() else "fsdp2" if uses_fsdp() else ""
    if train.fused_backward and (processes > 1 or shards):
        raise UserError(
            f"--train.fused_backward steps before processes could average their gradients, and {processes} run: start "
            "it without a launcher, or set --train.fused_backward false"
        )
    if train.compile and shards:
        raise UserError(f"--train.compile is not tried with shards: --launch {shards} needs --train.compile false")
    if train.compile:
        require_compiler("train.compile")
    if shards and (train.optimizer != "adamw" or train.mixed_precision == "fp16"):
        raise UserError(
            f"--launch {shards} shards AdamW in float32 or bf16: --train.optimizer {train.optimizer} with "
            f"--train.mixed_precision {train.mixed_precision} needs --launch ddp"
        )


def build_accelerator(device: torch.device, mixed_precision: str) -> Accelerator:
    """accelerate as the launcher asks for it."""
    if uses_deepspeed():
        return Accelerator(mixed_precision="no")
    if uses_fsdp():
        return plain_accelerator(device)
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision)


def build_engine(
    accelerator: Accelerator,
    unet: nn.Module,
    weights: Weights,
    optimizer: torch.optim.Optimizer | BackwardOptimizer,
    config: RunConfig,
) -> Engine | ShardEngine:
    """The engine that the launcher asks for."""
    if isinstance(optimizer, BackwardOptimizer):
        return FusedEngine(accelerator, unet, weights, optimizer, config)
    kind: type[Engine | ShardEngine] = ShardEngine if uses_fsdp() else Engine
    if uses_deepspeed():
        kind = PartitionEngine if zero_stage() == "3" else ZeroEngine
    return kind(accelerator, unet, weights, optimizer, config)
