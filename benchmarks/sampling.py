"""What does the project's denoising loop gain? `python -m benchmarks.sampling` prints the ratio of one run.

Draws 64 pictures of the embedded base with `Sampler` and with the stock `StableDiffusionXLPipeline` called in batches
of 8: same prompts, noise of the seeds, solver, steps and guidance, in turns, so that a busy machine slows both. The
stock pipeline encodes its prompts at each call, as its users do. Ends with 1 where the gain is too small or pictures
differ. `--compile` measures `Sampler.compile` as well, which takes minutes at its first batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.machine import machine, said
from dfu_mlflow.base.load import load_base
from dfu_mlflow.bundle_format import Settings
from dfu_mlflow.conditioning import encode_prompts
from dfu_mlflow.config.prompts import MINIMAL
from dfu_mlflow.config.schema import SamplingConfig
from dfu_mlflow.runtime import generator
from dfu_mlflow.sampling import Sampler, build_scheduler
from dfu_mlflow.types import Pipeline

GAIN = 1.2
MOST_STEPS, MOST_SHARE = 1, 0.001
STOCK_BATCH = 8
RESOLUTION_PX = 64


@dataclass(frozen=True)
class Work:
    """Labels and seeds of the pictures, and how they are drawn."""

    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Settings


def build_sampler(settings: Settings, batch_size: int) -> Sampler:
    """The embedded base with the minimal prompts."""
    pipe = load_base("tiny_sdxl")
    return Sampler(pipe, encode_prompts(pipe, dict(MINIMAL), ""), settings, batch_size)


def stock(pipe: Pipeline, work: Work) -> np.ndarray:
    """The pictures, uint8 [N, H, W, 3], as a user of diffusers draws them."""
    settings, kept = work.settings, pipe.scheduler
    pipe.scheduler = build_scheduler(dict(kept.config), settings.scheduler, None)
    edge = settings.resolution_px // pipe.vae_scale_factor
    drawn = []
    try:
        for start in range(0, len(work.seeds), STOCK_BATCH):
            rows = slice(start, start + STOCK_BATCH)
            noise = [torch.randn(4, edge, edge, generator=generator(seed, "image")) for seed in work.seeds[rows]]
            output = pipe(
                prompt=[MINIMAL[label] for label in work.labels[rows]],
                latents=torch.stack(noise),
                height=settings.resolution_px,
                width=settings.resolution_px,
                original_size=settings.original_size_px,
                guidance_scale=settings.guidance_scale,
                num_inference_steps=settings.num_inference_steps,
                output_type="np",
            )
            drawn.append((output.images * 255).round().astype(np.uint8))
    finally:
        pipe.scheduler = kept
    return np.concatenate(drawn)


def timed(draw: Callable[[], np.ndarray]) -> tuple[float, float, np.ndarray]:
    """Seconds on the clock, seconds of processor time, pictures."""
    clock_s, processor_s = time.perf_counter(), time.process_time()
    images = draw()
    return time.perf_counter() - clock_s, time.process_time() - processor_s, images


def compare(sampler: Sampler, work: Work, repeats: int) -> bool:
    """Print both rates, their ratio and how far the pictures are apart."""
    stock(sampler.pipe, Work(work.labels[:1], work.seeds[:1], work.settings))
    sampler.draw(work.labels[:1], work.seeds[:1])
    clock, processor = [], []
    for _ in range(repeats):
        stock_s, stock_cpu_s, expected = timed(lambda: stock(sampler.pipe, work))
        own_s, own_cpu_s, images = timed(lambda: sampler.draw(work.labels, work.seeds))
        clock.append(stock_s / own_s)
        processor.append(stock_cpu_s / own_cpu_s)
        count = len(work.seeds)
        print(
            f"stock, batches of {STOCK_BATCH}: {count / stock_s:.2f} pictures/s; ours, batches of "
            f"{sampler.batch_size}: {count / own_s:.2f} ({clock[-1]:.2f} times; by processor time {processor[-1]:.2f})",
            flush=True,
        )
    apart = np.abs(images.astype(int) - expected.astype(int))
    share, gain = float((apart > 0).mean()), statistics.median(clock)
    same, fast = apart.max() <= MOST_STEPS and share <= MOST_SHARE, gain >= GAIN
    print(
        f"pictures: at most {apart.max()} 8-bit steps apart, on {share:.4%} of values (at most {MOST_STEPS} on "
        f"{MOST_SHARE:.1%} wanted) {said(bool(same))}"
    )
    print(f"throughput: {gain:.2f} times the stock pipeline's (at least {GAIN} wanted) {said(fast)}")
    return bool(same and fast)


def compare_compiled(sampler: Sampler, compiled: Sampler, work: Work, repeats: int) -> None:
    """Print what compiling costs once, and the plain and the compiled sampler's times, in turns."""
    compiled.compile()
    first_s, *_ = timed(lambda: compiled.draw(work.labels[:1], work.seeds[:1]))
    ratios = []
    for _ in range(repeats):
        plain_s, _, expected = timed(lambda: sampler.draw(work.labels, work.seeds))
        compiled_s, _, images = timed(lambda: compiled.draw(work.labels, work.seeds))
        ratios.append(compiled_s / plain_s)
    apart = np.abs(images.astype(int) - expected.astype(int))
    said_ratios = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(
        f"compiled: {statistics.median(ratios):.2f} of the plain sampler's time ({said_ratios}) after {first_s:.0f} s; "
        f"at most {apart.max()} 8-bit steps apart, on {(apart > 0).mean():.4%} of values"
    )


def main(arguments: Sequence[str]) -> int:
    """Run it; 0 where both targets are met."""
    own = SamplingConfig()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=own.batch_size, help="ours")
    parser.add_argument("--steps", type=int, default=own.num_inference_steps)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="ours once more, compiled")
    chosen = parser.parse_args(arguments)
    print(f"{machine('torch')}, {chosen.steps} steps")
    size = (RESOLUTION_PX, RESOLUTION_PX)
    settings = Settings(own.guidance_scale, chosen.steps, RESOLUTION_PX, size, scheduler=own.scheduler)
    sampler, compiled = (build_sampler(settings, chosen.batch_size) for _ in range(2))
    labels = tuple("IPR"[number % 3] for number in range(chosen.pictures))
    work = Work(labels, tuple(range(chosen.pictures)), settings)
    good = compare(sampler, work, chosen.repeats)
    if chosen.compile:
        compare_compiled(sampler, compiled, work, chosen.repeats)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
