"""Arithmetic of a picture, counted on tensors without content, and a card's bf16 rate, measured."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cuda_memory import timed
from dfu_mlflow.base.adapters import attach
from dfu_mlflow.base.load import resolve_base
from dfu_mlflow.base.published import meta_modules
from dfu_mlflow.config import RunConfig
from dfu_mlflow.objective import predict
from dfu_mlflow.types import Conditioning

TOKENS = 77


def picture_flops(config: RunConfig) -> tuple[float, float]:
    """Floating-point operations of the UNet for one picture: forward alone, and forward with backward.

    Of matrix products, convolutions and attention, as torch counts them; a multiplication and an addition are two. The
    backward pass computes what the adapter needs; what gradient checkpointing computes a second time is no gain, and
    not counted.
    """
    modules = meta_modules(resolve_base(config.base_model))
    unet: Any = modules["unet"]
    vae: Any = modules["vae"]
    edge = math.ceil(config.data.resolution_px / 2 ** (len(vae.config.block_out_channels) - 1))
    with torch.device("meta"):
        attach(unet, config.adapter, seed=0)
        noisy, told = _inputs(unet.config, edge)
        timesteps = torch.ones(1, dtype=torch.int64)
    unet.train()
    with FlopCounterMode(display=False) as counter:
        prediction = predict(unet, noisy, timesteps, told)
        forward = counter.get_total_flops()
        prediction.pow(2).mean().backward()
    return float(forward), float(counter.get_total_flops())


def matmul_rate(device: torch.device, edge: int, seconds: float) -> float:
    """Floating-point operations a second of a product of two square bf16 matrices: what a card reaches at its best."""
    first, second = (torch.randn(edge, edge, device=device, dtype=torch.bfloat16) for _ in range(2))
    answer = torch.empty_like(first)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def work() -> None:
        for _ in range(10):
            torch.mm(first, second, out=answer)
        wait()  # else the clock would only see how fast products are queued

    timed(work, wait, seconds / 4, 1)
    count, taken_s = timed(work, wait, seconds, 2)
    return 10 * count * 2 * edge**3 / taken_s


def _inputs(unet: Any, edge: int) -> tuple[torch.Tensor, Conditioning]:
    pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
    told = Conditioning(torch.empty(1, TOKENS, unet.cross_attention_dim), torch.empty(1, pooled), torch.empty(1, 6))
    return torch.empty(1, unet.in_channels, edge, edge), told
