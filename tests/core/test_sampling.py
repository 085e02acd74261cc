"""The project's denoising loop against the stock pipeline's, and pictures that do not depend on their batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dfu_mlflow.base.adapters import attach
from dfu_mlflow.base.load import load_base
from dfu_mlflow.bundle_format import Settings
from dfu_mlflow.conditioning import encode_prompts
from dfu_mlflow.config.prompts import MINIMAL
from dfu_mlflow.config.schema import AdapterConfig
from dfu_mlflow.errors import Interrupted
from dfu_mlflow.runtime import generator
from dfu_mlflow.sampling import Sampler, build_scheduler

SETTINGS = Settings(3.0, 4, 64, (80, 96), scheduler="dpmpp_2m")
LABELS, SEEDS = ["I", "P", "R", "P"], [3, 5, 8, 13]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_base("tiny_sdxl")


def stock(pipe: Any, sampler: Sampler, settings: Settings) -> np.ndarray:
    """The pictures as `StableDiffusionXLPipeline` itself draws them."""
    noise = torch.stack([torch.randn(4, 16, 16, generator=generator(seed, "image")) for seed in SEEDS])
    kept = pipe.scheduler
    pipe.scheduler = build_scheduler(dict(kept.config), settings.scheduler, settings.prediction_type)
    try:
        drawn = pipe(
            **sampler.conditioner.sampling(torch.tensor([sampler.classes.index(label) for label in LABELS])),
            latents=noise,
            height=settings.resolution_px,
            width=settings.resolution_px,
            original_size=settings.original_size_px,
            guidance_scale=settings.guidance_scale,
            guidance_rescale=settings.guidance_rescale,
            num_inference_steps=settings.num_inference_steps,
            output_type="np",
        ).images
    finally:
        pipe.scheduler = kept
    pixels: np.ndarray = (drawn * 255).round().astype(np.uint8)
    return pixels


@pytest.mark.parametrize("count", [1, 5, 8])
def test_a_compiled_sampler_goes_on_with_smaller_batches(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Filled-up batches of the old size would not fit any better than the whole one did."""
    sampler = Sampler(pipe, encode_prompts(pipe, dict(MINIMAL), ""), SETTINGS, batch_size=8)
    monkeypatch.setattr(pipe.unet, "compile", lambda: None)
    sampler.compile()
    assert sampler.filled_to == 8
    tried, forward = [], pipe.unet.forward

    def with_room_for_two(sample: torch.Tensor, *told: Any, **named: Any) -> Any:
        tried.append(len(sample))
        if len(sample) > 4:  # of each picture two rows: with and without its prompt
            raise torch.OutOfMemoryError
        return forward(sample, *told, **named)

    monkeypatch.setattr(pipe.unet, "forward", with_room_for_two)
    labels, seeds = (LABELS * 2)[:count], list(range(count))
    drawn = sampler.draw(labels, seeds)
    assert tried[:2] == [16, 8]
    assert set(tried[2:]) == {4}
    assert (sampler.filled_to, sampler.batch_size) == (2, 2)
    assert_same(drawn, Sampler(pipe, sampler.conditioner, SETTINGS, batch_size=2).draw(labels, seeds))
    sampler.filled_to = 4
    monkeypatch.setattr(pipe.unet, "forward", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        sampler.draw(labels, seeds)


def assert_same(first: np.ndarray, second: np.ndarray) -> None:
    steps = np.abs(first.astype(int) - second.astype(int))
    assert steps.max() <= 1
    assert (steps > 0).mean() <= 0.001


@pytest.mark.parametrize(
    ("change", "negative_prompt"),
    [
        ({}, ""),
        ({}, "cartoon"),
        ({"guidance_scale": 1.0}, ""),
        ({"guidance_rescale": 0.7}, ""),
        ({"scheduler": "base"}, ""),
        ({"scheduler": "euler"}, ""),
        ({"scheduler": "unipc"}, ""),
    ],
)
def test_pictures_are_the_stock_pipelines(pipe: Any, change: dict[str, Any], negative_prompt: str) -> None:
    settings = replace(SETTINGS, **change)
    processors = pipe.unet.attn_processors
    sampler = Sampler(pipe, encode_prompts(pipe, dict(MINIMAL), negative_prompt), settings, batch_size=4)
    assert_same(sampler.draw(LABELS, SEEDS), stock(pipe, sampler, settings))
    assert pipe.unet.attn_processors == processors, "the network is left as it was"


def test_an_unconditional_that_is_not_zeros_is_attended_to(pipe: Any) -> None:
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        sampler = Sampler(pipe, encode_prompts(pipe, dict(MINIMAL), ""), SETTINGS, batch_size=4)
        assert torch.count_nonzero(sampler.conditioner.negative_embeddings) > 0
        assert_same(sampler.draw(LABELS, SEEDS), stock(pipe, sampler, SETTINGS))
    finally:
        pipe.register_to_config(force_zeros_for_empty_prompt=True)


def test_guidance_may_differ_within_a_batch(pipe: Any) -> None:
    sampler = Sampler(pipe, encode_prompts(pipe, dict(MINIMAL), ""), SETTINGS, batch_size=4)
    scales = [1.5, 3.0, 3.0, 7.0]
    ids = torch.tensor([sampler.classes.index(label) for label in LABELS])
    together = sampler.generate(ids, SEEDS, guidance_scales=scales)
    alone = [sampler.draw([label], [seed], scale) for label, seed, scale in zip(LABELS, SEEDS, scales, strict=True)]
    assert_same(together, np.concatenate(alone))
    assert SETTINGS.fits(replace(SETTINGS, guidance_scale=1.5))
    assert not SETTINGS.fits(replace(SETTINGS, guidance_scale=1.0)), "one needs no unconditional prediction"
    assert not SETTINGS.fits(replace(SETTINGS, num_inference_steps=5))


@pytest.mark.parametrize("dora", [False, True])
def test_pictures_of_a_trained_lora_are_the_stock_pipelines(dora: bool) -> None:
    pipe = load_base("tiny_sdxl")
    plain = Sampler(pipe, encode_prompts(pipe, dict(MINIMAL), ""), SETTINGS, batch_size=4).draw(LABELS, SEEDS)
    weights = attach(pipe.unet, AdapterConfig(method="lora", rank=4, use_dora=dora), seed=0)
    source = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if "lora_B" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=source)
    sampler = Sampler(pipe, encode_prompts(pipe, dict(MINIMAL), ""), SETTINGS, batch_size=4)
    drawn = sampler.draw(LABELS, SEEDS)
    assert_same(drawn, stock(pipe, sampler, SETTINGS))
    assert np.abs(drawn.astype(int) - plain.astype(int)).max() > 10, "the adapter changes pictures"


def test_a_drawing_that_is_stopped_leaves_the_network_as_it_was(pipe: Any) -> None:
    def stop() -> None:
        raise Interrupted("asked to stop")

    processors = pipe.unet.attn_processors
    sampler = Sampler(pipe, encode_prompts(pipe, dict(MINIMAL), ""), SETTINGS, batch_size=4)
    with pytest.raises(Interrupted):
        sampler.generate(torch.tensor([0, 1]), [1, 2], between_steps=stop)
    assert pipe.unet.attn_processors == processors
