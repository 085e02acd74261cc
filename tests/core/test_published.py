"""The real Stable Diffusion XL modules, without their weights."""

from __future__ import annotations

import pytest
import torch

from dfu_mlflow.base.adapters import attach, trainable_fraction
from dfu_mlflow.base.published import meta_modules
from dfu_mlflow.config import RunConfig, load, preset_names
from dfu_mlflow.memory import GIB, count, training_memory
from dfu_mlflow.memory_phases import run_memory


@pytest.mark.parametrize(("preset", "trained"), [("sdxl_lora", 334_888_960), ("sdxl_full", 2_567_463_684)])
def test_presets_build_the_real_unet(preset: str, trained: int) -> None:
    config = load(RunConfig, preset)
    modules = meta_modules(config.base_model)
    unet = modules["unet"]
    assert count(unet) == 2_567_463_684
    assert count(modules["vae"]) == 83_653_863
    assert count(modules["text_encoder"]) == 123_060_480
    assert count(modules["text_encoder_2"]) == 694_659_840
    with torch.device("meta"):
        weights = attach(unet, config.adapter, seed=0)
    assert sum(weight.numel() for weight in weights.values()) == trained
    assert round(trainable_fraction(unet, weights), 3) == (0.115 if preset == "sdxl_lora" else 1.0)


def test_every_preset_loads() -> None:
    assert {"tiny", "sdxl_lora", "sdxl_full", "seed_before", "seed_after"} <= set(preset_names())
    for name in preset_names():
        load(RunConfig, name)


def test_memory_plan_of_full_fine_tuning_counts_every_copy() -> None:
    parts = training_memory(load(RunConfig, "sdxl_full"), "stabilityai/stable-diffusion-xl-base-1.0")
    assert parts.unet == parts.gradients == parts.ema == pytest.approx(9.565 * GIB, rel=1e-4)
    assert parts.optimizer == pytest.approx(2 * parts.unet)
    assert parts.checkpoint == pytest.approx(4 * parts.unet)
    assert parts.activations > GIB


def test_an_average_on_the_host_leaves_the_device() -> None:
    config = load(RunConfig, "sdxl_full", ["--ema.on_host", "true"])
    memory = run_memory(config, "stabilityai/stable-diffusion-xl-base-1.0", shared=False, libraries=0.0)
    phases = {phase.name: phase for phase in memory.phases}
    assert phases["encoding prompts"].host["text encoders, until prompts are encoded"] == pytest.approx(
        3.047 * GIB, rel=1e-3
    )
    assert "EMA" not in phases["evaluation"].device
    assert phases["evaluation"].host["EMA"] == phases["evaluation"].device["UNet"]
