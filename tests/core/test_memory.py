"""The memory plan against what optimizers and torch's own allocator really take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dfu_mlflow.activations import activation_bytes
from dfu_mlflow.base.adapters import attach, store_frozen
from dfu_mlflow.config import RunConfig, load
from dfu_mlflow.config.load import validate
from dfu_mlflow.ema import ExponentialMovingAverage
from dfu_mlflow.errors import ConfigError
from dfu_mlflow.memory import GIB, TrainingMemory, training_memory
from dfu_mlflow.memory_limits import Limits
from dfu_mlflow.memory_phases import CUDA_BYTES, run_memory
from dfu_mlflow.objective import predict
from dfu_mlflow.optimizers import build_optimizer, state_bytes
from dfu_mlflow.types import Conditioning

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
WIDER = {"block_out_channels": (64, 128), "attention_head_dim": (4, 8), "cross_attention_dim": 256}
EDGE = 16


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
@pytest.mark.parametrize("shape", [(7,), (5000,), (64, 64), (60, 50), (32, 48, 3, 3)])
def test_optimizers_keep_what_is_planned(optimizer: str, shape: tuple[int, ...]) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    weight = nn.Parameter(torch.ones(shape))
    built = build_optimizer([weight], validate(RunConfig, {"train": {"optimizer": optimizer}}).train)
    weight.grad = torch.ones(shape)
    built.step()
    kept = {key: value for key, value in built.state[weight].items() if isinstance(value, torch.Tensor)}
    shared = ("step", "qmap1", "qmap2")  # a number; tables that all weights share
    counted = sum(value.nbytes for key, value in kept.items() if key not in shared)
    assert state_bytes(weight.shape, optimizer) == pytest.approx(counted, rel=0.01)


def allocated_peak(unet: Any, rows: int, half: bool) -> int:
    """Most bytes that a real training step asked torch's allocator for, by the profiler.

    Not what a convolution unfolds its input into on a processor without bf16 of its own: no tensor, and freed with it.
    """
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def step() -> None:
        told = Conditioning(
            torch.randn(rows, 77, config.cross_attention_dim), torch.randn(rows, pooled), torch.ones(rows, 6)
        )
        noisy = torch.randn(rows, config.in_channels, EDGE, EDGE)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = (predict(unet, noisy, torch.ones(rows, dtype=torch.int64), told).float() - noisy).pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]

    for weight in unet.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    assert recorded.profiler is not None
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live = peak = unfolded_until = 0
    for event in events:
        if "_slow_conv2d_" in event.name():
            unfolded_until = event.start_ns() + event.duration_ns()
        elif event.name() == "[memory]":
            live += event.nbytes()
            if event.start_ns() > unfolded_until:
                peak = max(peak, live)
    return peak


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("width", "rows"), [({}, 2), ({}, 6), (WIDER, 2), (WIDER, 6)])
def test_activations_are_what_the_allocator_is_asked_for(
    random_base: Path, width: dict[str, Any], rows: int, checkpointing: bool, precision: str
) -> None:
    shape = {**UNet2DConditionModel.load_config(str(random_base / "unet")), **width}
    unet: Any = UNet2DConditionModel.from_config(shape)
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    train = {"batch_size": rows, "gradient_checkpointing": checkpointing, "mixed_precision": precision}
    config = validate(RunConfig, {"device": "cpu", "train": train})
    with torch.device("meta"):
        shapes = UNet2DConditionModel.from_config(shape)
    estimated = activation_bytes(shapes, EDGE, config)
    assert estimated == pytest.approx(allocated_peak(unet, rows, precision == "bf16"), rel=0.15)


@pytest.mark.parametrize(("preset", "card_gib"), [("sdxl_full_24gb", 24), ("sdxl_lora_12gb", 12)])
def test_presets_fit_their_cards(preset: str, card_gib: float) -> None:
    config = load(RunConfig, preset)
    memory = run_memory(config, SDXL, shared=False, libraries=0.0)
    largest = memory.largest_on_device()
    assert largest.on_device() + CUDA_BYTES < card_gib * GIB, largest
    assert all("EMA" not in phase.device for phase in memory.phases)
    assert Limits(config, host=64 * GIB, device=card_gib * GIB).lacking(memory) is None
    lacking = Limits(config, host=64 * GIB, device=largest.on_device()).lacking(memory)
    assert lacking is not None
    assert f"while {largest.name}" in lacking


def test_gradients_of_a_fused_backward_pass_are_not_kept(random_base: Path) -> None:
    change: dict[str, Any] = {"adapter": {"method": "full"}, "train": {"max_grad_norm": None}}

    def planned() -> TrainingMemory:
        return training_memory(validate(RunConfig, change), str(random_base))

    kept = planned()
    change["train"]["fused_backward"] = True
    fused = planned()
    assert kept.gradients == kept.unet
    assert replace(fused, gradients=kept.gradients) == kept
    assert fused.gradients == 0.0
    change["loss"] = {"perceptual_loss": {"enabled": True}}  # its share of the gradient needs all of it, once an epoch
    assert planned().gradients == kept.gradients


def test_frozen_matrices_in_bf16_change_no_bit_of_a_step_in_bf16(random_base: Path) -> None:
    shape = UNet2DConditionModel.load_config(str(random_base / "unet"))
    config = load(RunConfig, "sdxl_lora_12gb").adapter
    torch.manual_seed(1)
    start = UNet2DConditionModel.from_config(shape).state_dict()
    told = Conditioning(torch.randn(2, 77, 64), torch.randn(2, 24), torch.ones(2, 6))
    noisy, steps = torch.randn(2, 4, EDGE, EDGE), torch.tensor([10, 900])
    results = []
    for stored in ("float32", "bfloat16"):
        unet: Any = UNet2DConditionModel.from_config(shape)
        unet.load_state_dict(start)
        adapter = config.model_copy(update={"frozen_dtype": stored, "rank": 4})
        weights = attach(unet, adapter, seed=0)
        with torch.no_grad():
            for weight in weights.values():
                weight.add_(0.05)  # an adapter starts as nothing
        before = sum(weight.nbytes for weight in unet.parameters())
        store_frozen(unet, adapter)
        saved = before - sum(weight.nbytes for weight in unet.parameters())
        assert unet.dtype == torch.float32, "sampling starts in the UNet's dtype"
        with torch.autocast("cpu", torch.bfloat16):
            prediction = predict(unet, noisy, steps, told)
        prediction.float().pow(2).mean().backward()
        results.append((saved, [prediction.detach(), *(weight.grad for weight in weights.values())]))
    (nothing, first), (saved, second) = results
    assert nothing == 0
    assert saved > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": {"method": "full"}}, "--adapter.method lora"),
        ({"adapter": {"method": "lora", "use_dora": True}}, "--adapter.use_dora false"),
        ({"adapter": {"method": "lora"}, "train": {"mixed_precision": "no"}}, "--train.mixed_precision bf16, not no"),
    ],
)
def test_rounding_what_is_not_computed_in_bf16_is_refused(change: dict[str, Any], message: str) -> None:
    tree = {"train": {"mixed_precision": "bf16"}, **change}
    tree["adapter"] = {**tree["adapter"], "frozen_dtype": "bfloat16"}
    with pytest.raises(ConfigError, match=message):
        validate(RunConfig, tree)


def test_an_average_on_the_host_is_the_same_average() -> None:
    weights = {name: nn.Parameter(torch.randn(3, 4)) for name in "ab"}
    beside = ExponentialMovingAverage(weights, 0.9, warmup=True)
    host = ExponentialMovingAverage(weights, 0.9, warmup=True, place=torch.device("cpu"))
    for _ in range(5):
        with torch.no_grad():
            for weight in weights.values():
                weight.add_(torch.randn(3, 4))
        beside.update(weights)
        host.update(weights)
    assert beside.updates == host.updates == 5
    assert all(torch.equal(beside.average[name], host.average[name]) for name in weights)
