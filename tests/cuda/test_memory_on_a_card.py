"""The memory plan against what a card's allocator counts in a training step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.cuda_memory import planned_gib
from dfu_mlflow.activations import LiveBytes
from dfu_mlflow.checkpoint import optimizer_tensors
from dfu_mlflow.memory import GIB
from dfu_mlflow.runtime import release_memory
from dfu_mlflow.trainer import Trainer

# What libraries warn of on a card is not known yet.
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]

Build = Callable[..., Trainer]


@pytest.fixture(scope="module")
def wider_base(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random base with a UNet of some million weights, so that cuBLAS's workspace is small beside it."""
    folder = tmp_path_factory.mktemp("wider") / "base"
    shutil.copytree(random_base, folder)
    shutil.rmtree(folder / "unet")
    shape = UNet2DConditionModel.load_config(str(random_base / "unet"))
    wide = {"block_out_channels": (128, 256), "attention_head_dim": (4, 8)}
    UNet2DConditionModel.from_config({**shape, **wide}).save_pretrained(folder / "unet")
    return folder


def peak_bytes(trainer: Trainer, device: torch.device, before: int) -> int:
    """The most of one step, the first one being done; on a CPU everything that lives, and what the step makes."""
    trainer.progress.epoch = 1
    trainer.parts.unet.train()
    trainer.train_step(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        trainer.train_step(1)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = [*trainer.parts.unet.parameters(), *optimizer_tensors(trainer.parts.optimizer).values()]
    if trainer.parts.ema is not None:
        held += trainer.parts.ema.average.values()
    with LiveBytes(held) as counter:
        trainer.train_step(1)
    return int(counter.peak) + sum(tensor.nbytes for tensor in held)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"adapter": {"method": "lora", "rank": 8, "frozen_dtype": "bfloat16"}},
        {"train": {"fused_backward": True, "max_grad_norm": None, "optimizer": "adafactor"}},
    ],
    ids=["lora", "full"],
)
def test_a_step_takes_what_is_planned(
    build: Build, device: torch.device, wider_base: Path, change: dict[str, Any], checkpointing: bool
) -> None:
    """Where gradients are kept they do not peak together with activations: the sum of the plan is too much there."""
    train = {
        **change.get("train", {}),
        "batch_size": 48 if device.type == "cuda" else 2,
        "gradient_checkpointing": checkpointing,
        "mixed_precision": "bf16",
    }
    release_memory()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    data = {"resolution_px": 128 if device.type == "cuda" else 64, "min_side_px": 32}
    trainer = build(device, "a", **{**change, "train": train, "data": data, "base_model": str(wider_base)})
    planned = GIB * planned_gib(trainer.config)
    assert peak_bytes(trainer, device, before) == pytest.approx(planned, rel=0.15)
