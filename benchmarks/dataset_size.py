"""Does a step cost more with more photographs? `python -m benchmarks.dataset_size` prints ratios of one run.

The embedded base takes steps on caches of 100, 1,000 and 10,000 latents, in turns; each cache is opened anew; and
photographs are encoded in batches of 1, 4, 16 and 64. Processor times decide: they hold on a shared machine too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from benchmarks.machine import machine, said
from dfu_mlflow.base.autoencoder import VaeEncoder
from dfu_mlflow.base.load import BaseModel, load_base
from dfu_mlflow.batches import Batches
from dfu_mlflow.checkpoint import CheckpointStore
from dfu_mlflow.conditioning import Conditioner, encode_prompts
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import validate
from dfu_mlflow.data import RowCache
from dfu_mlflow.objective import Objective
from dfu_mlflow.optimizers import build_optimizer
from dfu_mlflow.trainer import Hooks, Parts, Trainer
from dfu_mlflow.types import Latents, Pipeline

SIZES = (100, 1_000, 10_000)
GROWTH_BAR = 1.05
OPENING_BAR_S = 1.0
ENCODED_TOGETHER = (1, 4, 16, 64)
SHAPE = (8, 16, 16)
"""Of the embedded base's moments at 64 px."""


def open_cache(folder: Path, rows: int) -> Latents:
    """`rows` latents out of a cache, made where they are missing."""
    source = torch.Generator().manual_seed(0)

    def compute(positions: list[int]) -> torch.Tensor:
        return torch.rand((len(positions), *SHAPE), generator=source)

    moments = RowCache(folder).stored("latents", [f"{number:064x}" for number in range(rows)], compute, 64)
    ids = torch.arange(rows) % 3
    return Latents(moments, ids, torch.full((rows, 6), 64.0), tuple(map(str, range(rows))), ("I", "P", "R"))


def build(pipe: Pipeline, conditioner: Conditioner, latents: Latents, folder: Path) -> Trainer:
    """A trainer on these latents that evaluates nothing."""
    train = {"epochs": 1, "steps_per_epoch": 10_000, "batch_size": 4, "learning_rate": 1e-6}
    config = validate(RunConfig, {"device": "cpu", "train": train, "ema": {"enabled": False}})
    pipe.unet.requires_grad_(True)
    weights = dict(pipe.unet.named_parameters())
    parts = Parts(
        unet=pipe.unet,
        weights=weights,
        optimizer=build_optimizer(weights.values(), config.train),
        objective=Objective(dict(pipe.scheduler.config), config.loss),
        conditioner=conditioner,
        batches=Batches(latents, 1.0, config),
        ema=None,
    )
    hooks = Hooks(lambda *_: None, lambda *_: None, lambda: None, lambda: False)
    trainer = Trainer(parts, config, CheckpointStore(folder, 1), hooks, Accelerator(cpu=True))
    trainer.progress.epoch = 1
    return trainer


def processor_s(work: Callable[[], object]) -> float:
    """Processor seconds that it takes."""
    start_s = time.process_time()
    work()
    return time.process_time() - start_s


def compare_steps(folder: Path, turns: int) -> bool:
    """Print seconds a step by size; True where none is above the smallest one's by more than the bar."""
    pipe = load_base("tiny_sdxl")
    conditioner = encode_prompts(pipe, {"I": "one", "P": "two", "R": "three"}, "")
    trainers = {size: build(pipe, conditioner, open_cache(folder / str(size), size), folder) for size in SIZES}
    times: dict[int, list[float]] = {size: [] for size in SIZES}
    for turn in range(turns + 3):
        for size, trainer in trainers.items():
            seconds = processor_s(lambda trainer=trainer, turn=turn: trainer.train_step(turn))  # type: ignore[misc]
            if turn >= 3:
                times[size].append(seconds)
    ratios = {
        size: statistics.median(mine / first for mine, first in zip(times[size], times[SIZES[0]], strict=True))
        for size in SIZES
    }
    good = max(ratios.values()) <= GROWTH_BAR
    shown = ", ".join(
        f"{size:,}: {1e3 * statistics.median(times[size]):.1f} ms ({ratio:.3f})" for size, ratio in ratios.items()
    )
    print(f"a step by latents in the cache: {shown}; at most {GROWTH_BAR} wanted {said(good)}", flush=True)
    return good


def compare_opening(folder: Path) -> bool:
    """Print seconds to open each cache; True where the largest opens in time."""
    for size in SIZES:
        open_cache(folder / str(size), size)
    seconds = {
        size: min(processor_s(lambda size=size: open_cache(folder / str(size), size)) for _ in range(3))
        for size in SIZES
    }  # type: ignore[misc]
    good = seconds[SIZES[-1]] <= OPENING_BAR_S
    shown = ", ".join(f"{size:,}: {value:.3f} s" for size, value in seconds.items())
    print(f"opening a warm cache: {shown}; under {OPENING_BAR_S:g} s wanted {said(good)}", flush=True)
    return good


def show_encoding(pictures: int) -> None:
    """Print pictures a second by batch size."""
    encoder = VaeEncoder(BaseModel("tiny_sdxl").vae(), "")
    pixels = torch.randint(0, 256, (pictures, 64, 64, 3), dtype=torch.uint8)
    encoder(pixels[:64])
    rates = {
        size: pictures / processor_s(lambda size=size: [encoder(part) for part in pixels.split(size)])  # type: ignore[misc]
        for size in ENCODED_TOGETHER
    }
    print("encoding by batch: " + ", ".join(f"{size}: {rate:.0f} pictures/s" for size, rate in rates.items()))


def main(arguments: Sequence[str]) -> int:
    """Run everything; 0 where all bars are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--pictures", type=int, default=256)
    options = parser.parse_args(arguments)
    print(machine("torch"))
    with tempfile.TemporaryDirectory() as temporary:
        good = [compare_opening(Path(temporary)), compare_steps(Path(temporary), options.turns)]
    show_encoding(options.pictures)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
