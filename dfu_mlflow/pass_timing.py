"""Seconds that a pass takes on this device: a short timing of the architecture without weights, scaled by FLOPs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from dfu_mlflow.activations import network_inputs
from dfu_mlflow.base.published import meta_modules
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.objective import predict
from dfu_mlflow.runtime import HALF

LIMIT_S = 2.0
"""A timing grows until the next one would take longer."""
SMALLEST = 8
"""Edge of the first latents."""


@dataclass(frozen=True)
class PassTimes:
    """Estimates [s].

    Attributes:
        pass_s: one picture through the UNet once.
        encode_s, decode_s: one picture through a half of the autoencoder.
    """

    pass_s: float
    encode_s: float
    decode_s: float


def time_passes(config: RunConfig, source: str, device: torch.device) -> PassTimes:
    """Time a run's architecture at its resolution, in its precision.

    What is timed of the UNet has the widths of the real one and one layer a block: in a shallow network the same
    kernels run, and one of 2.6 billion weights takes a slow processor a minute. Weights are whatever the memory holds.

    Args:
        source: as `resolve_base` gives it.

    Raises:
        RuntimeError: torch's, where the device has no room.
    """
    modules = meta_modules(source)
    unet: Any = modules["unet"]
    vae: Any = modules["vae"]
    edge = math.ceil(config.data.resolution_px / 2 ** (len(vae.config.block_out_channels) - 1))
    with torch.device("meta"):
        small = UNet2DConditionModel.from_config(
            {**unet.config, "layers_per_block": 1, "transformer_layers_per_block": 1}
        )
    dtype = HALF.get(config.train.mixed_precision, torch.float32)
    timed: Any = small.to(dtype).to_empty(device=device).eval()
    whole = _flops(_denoising(unet, edge, 1, torch.device("meta"), torch.float32))
    sizes = _sizes(edge, 2 ** (len(unet.config.block_out_channels) - 1), config.train.batch_size)
    rate = _rate(sizes, lambda size, rows: _denoising(timed, size, rows, device, dtype), device)
    halves = vae.to_empty(device=device).eval()
    empty: Any = meta_modules(source)["vae"]
    seconds = []
    for half in (_encoding, _decoding):
        flops = _flops(half(empty, edge, torch.device("meta")))

        def made(size: int, _: int, half: Half = half) -> Work:
            return half(halves, size, device)

        seconds.append(flops / _rate(_sizes(edge, 1, 1), made, device))
    return PassTimes(whole / rate, *seconds)


Work = Callable[[], object]
Half = Callable[[Any, int, torch.device], Work]


def _sizes(edge: int, divisor: int, rows: int) -> list[tuple[int, int]]:
    """(edge, rows) from small ones to the run's own."""
    edges = [edge]
    while edges[-1] % (2 * divisor) == 0 and edges[-1] // 2 >= SMALLEST:
        edges.append(edges[-1] // 2)
    return [(each, 1) for each in reversed(edges)] + [(edge, 2**power) for power in range(1, rows.bit_length())]


def _rate(sizes: Sequence[tuple[int, int]], made: Callable[[int, int], Work], device: torch.device) -> float:
    """FLOPs a second of the largest work that takes little enough, of those made for (edge, rows)."""
    pixels, seconds, rate = 0, 0.0, 0.0
    for edge, rows in sizes:
        if pixels and seconds * edge**2 * rows / pixels > LIMIT_S:
            break
        work = made(edge, rows)
        flops = _flops(work)  # which runs it: kernels are chosen and memory is touched
        _wait(device)
        started = time.perf_counter()
        with torch.no_grad():
            work()
        _wait(device)
        pixels, seconds = edge**2 * rows, time.perf_counter() - started
        rate = flops / seconds
    return rate


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flops(work: Work) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _denoising(unet: Any, edge: int, rows: int, device: torch.device, dtype: torch.dtype) -> Work:
    with torch.device(device):
        noisy, told = network_inputs(unet.config, edge, rows)
        noisy = torch.zeros_like(noisy, dtype=dtype)
        times = torch.ones(rows, dtype=torch.int64)
    told = type(told)(*(torch.zeros_like(each, dtype=dtype) for each in (told.embeddings, told.pooled, told.time_ids)))
    return lambda: predict(unet, noisy, times, told)


def _encoding(vae: Any, edge: int, device: torch.device) -> Work:
    side = edge * 2 ** (len(vae.config.block_out_channels) - 1)
    pixels = torch.zeros(1, vae.config.in_channels, side, side, device=device)
    return lambda: vae.encode(pixels, return_dict=False)


def _decoding(vae: Any, edge: int, device: torch.device) -> Work:
    latents = torch.zeros(1, vae.config.latent_channels, edge, edge, device=device)
    return lambda: vae.decode(latents, return_dict=False)
