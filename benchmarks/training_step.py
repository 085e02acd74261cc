"""Our training step beside that of diffusers' own script, which is given by its path and runs as it is.

    python -m benchmarks.training_step --diffusers-script train_text_to_image_sdxl.py [--python-path FOLDER]
        [--method full|lora] [--case tiny|real_width] [--workers 0 4] [--compile]

Both train the same base on the same files with the same batch, steps, precision and optimizer, in turns; ours is
`entrypoints.train` with all that it logs. Of the script's loader settings the fastest counts. `tiny` is the embedded
base at 64 px; `real_width` has a small UNet with embeddings of 77 x 2,048, an 8x autoencoder and photographs of 1 to
1.5 megapixel. Processor times stand beside the wall clock, because they hold on a machine that others use too. Where
tensorboard is absent the script tracks nothing: for memory it runs once more, logging to MLflow as ours does.
The script needs the package `datasets`: `--python-path` names a folder that has it, for the script alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from mlflow import MlflowClient

from benchmarks.machine import machine, said
from benchmarks.training_material import write_base, write_photographs

ROOT = Path(__file__).resolve().parent.parent
CLOCK = Path(__file__).with_name("step_clock_child.py")
STEP_BARS = {"tiny": 0.9, "real_width": 0.4}
WARM_START_BAR = 10.0
MEMORY_BAR = 1.0
RESOLUTION_PX = {"tiny": 64, "real_width": 128}
SKIPPED_STEPS = 4
"""At the start: allocator, workers and code paths warm up."""


@dataclass(frozen=True)
class Measured:
    """One training.

    Attributes:
        step_s, step_cpu_s: mean of the steady steps, by the wall clock and by the processor.
        setup_s: from the process's start to its first optimizer step.
        encoding_s, encoding_cpu_s: of that in `Dataset.map`; 0 where the program does not use it.
        peak_mib: largest resident memory of the process and its children together.
    """

    step_s: float
    step_cpu_s: float
    setup_s: float
    encoding_s: float
    encoding_cpu_s: float
    peak_mib: float


@dataclass(frozen=True)
class Bench:
    """What is compared, and where.

    Attributes:
        folder: for everything that is written; holds `base` and `photographs`.
        options: the command line.
    """

    folder: Path
    options: argparse.Namespace

    @property
    def store(self) -> str:
        """Where runs are tracked."""
        return f"sqlite:///{self.folder}/mlflow.db"

    def ours(self, turn: int, compiled: bool = False) -> Measured:
        """`entrypoints.train`; the first turn fills the cache."""
        resolution_px = RESOLUTION_PX[self.options.case]
        flags = {
            "config": "tiny",
            "base_model": self.folder / "base",
            "device": "cpu",
            "output_dir": self.folder / f"ours-{turn}-{compiled}",
            "data.root": self.folder / "photographs",
            "data.group_by": r"^P(\d+)",
            "data.cache_dir": self.folder / "cache",
            "data.resolution_px": resolution_px,
            "adapter.method": self.options.method,
            "adapter.rank": 4,
            "adapter.targets": "[to_q, to_k, to_v, to_out.0]",
            "train.epochs": 1,
            "train.steps_per_epoch": self.options.steps,
            "train.batch_size": self.options.batch_size,
            "train.learning_rate": 1e-5,
            "train.lr_schedule": "constant",
            "train.warmup_steps": 0,
            "train.compile": compiled,
            "ema.enabled": "false",
            "evaluation.samples": 12,
            "evaluation.grid_per_class": 1,
            "evaluation.validation_images": 4,
            "evaluation.validation_timesteps": 4,
            "sampling.num_inference_steps": 1,
            "sampling.batch_size": self.options.batch_size,
            "metrics.per_epoch": "[colour]",
            "registry.register_model": "false",
        }
        arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        environment = {"PYTHONPATH": ROOT, "MLFLOW_TRACKING_URI": self.store}
        return self.run(["-m", "entrypoints.train", *arguments], environment)

    def theirs(self, turn: int, workers: int, tracked: bool = False) -> Measured:
        """The script; another output folder makes it encode anew, as any change of its arguments does.

        Args:
            turn, workers: of the bench, and of its loader.
            tracked: let it log to MLflow as ours does, through accelerate's own tracker.
        """
        flags = {
            "pretrained_model_name_or_path": self.folder / "base",
            "train_data_dir": self.folder / "photographs",
            "resolution": RESOLUTION_PX[self.options.case],
            "train_batch_size": self.options.batch_size,
            "max_train_steps": self.options.steps,
            "learning_rate": 1e-5,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "mixed_precision": "no",
            "checkpointing_steps": 1_000_000,
            "dataloader_num_workers": workers,
            "seed": 0,
            "cache_dir": self.folder / "datasets",
            "output_dir": self.folder / f"theirs-{turn}-{workers}-{tracked}",
            "report_to": "mlflow" if tracked else "tensorboard",  # its default
        }
        if self.options.method == "lora":
            flags["rank"] = 4
        arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        environment = {"PYTHONPATH": self.options.python_path or "", "HF_HOME": self.folder / "hub"}
        environment["MLFLOW_TRACKING_URI"] = self.store
        return self.run([str(self.options.diffusers_script), *arguments, "--center_crop"], environment)

    def run(self, program: Sequence[str], environment: dict[str, object]) -> Measured:
        """Run a program under the clock."""
        result, log = self.folder / "times.json", self.folder / "log.txt"
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
        given = {**os.environ, **offline, "ACCELERATE_USE_CPU": "true"} | {k: str(v) for k, v in environment.items()}
        begun_s = time.time()
        with log.open("w", encoding="utf-8") as output:
            child = subprocess.Popen(
                [sys.executable, str(CLOCK), str(result), *program],
                cwd=self.folder,
                env=given,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            peak_mib = watch_memory(child)
        if child.returncode:
            raise SystemExit(f"{program[:2]} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
        times = json.loads(result.read_text(encoding="utf-8"))
        steady = times["times_s"][SKIPPED_STEPS:]
        wall_s, cpu_s = ((steady[-1][clock] - steady[0][clock]) / (len(steady) - 1) for clock in (0, 1))
        encoding = [sum(part[clock] for part in times["encoding_s"]) for clock in (0, 1)]
        peak_mib = max(peak_mib, times["peak_kib"] / 1024)  # its own is known exactly
        return Measured(wall_s, cpu_s, times["times_s"][0][0] - begun_s, encoding[0], encoding[1], peak_mib)


def watch_memory(child: subprocess.Popen[bytes]) -> float:
    """Wait for a process; the largest sum of its resident memory and what its children have beyond that, MiB.

    A child's own pages alone: one that was just forked shares all of its parent's.
    """
    peak, process, done = 0, psutil.Process(child.pid), threading.Event()
    while child.poll() is None:
        try:
            children = sum(one.memory_full_info().uss for one in process.children(recursive=True))
            peak = max(peak, process.memory_info().rss + children)
        except psutil.Error:  # a child that ended in between
            pass
        done.wait(0.5)  # looking for the children goes through all processes
    return peak / 2**20


def our_data_setup(folder: Path, resolution_px: int) -> tuple[float, float]:
    """(wall, processor) seconds from unread files to latents and embeddings, the base being loaded already."""
    from dfu_mlflow.base.autoencoder import VaeEncoder
    from dfu_mlflow.base.load import BaseModel
    from dfu_mlflow.conditioning import EmbeddingCache, encode_prompts
    from dfu_mlflow.config import RunConfig
    from dfu_mlflow.config.load import validate
    from dfu_mlflow.data import RowCache, encode_evaluation_latents, encode_latents
    from dfu_mlflow.preparation import read_source

    data = {
        "root": str(folder / "photographs"),
        "group_by": r"^P(\d+)",
        "cache_dir": str(folder / "cache"),
        "resolution_px": resolution_px,
    }
    config = validate(RunConfig, {"base_model": str(folder / "base"), "data": data})
    base = BaseModel(config.base_model)
    encoder = VaeEncoder(base.vae(), base.digest("vae"))
    encoders = (base.digest("text_encoder"), base.digest("text_encoder_2"))
    begun_s, begun_cpu_s = time.time(), time.process_time()
    source = read_source(config)
    cache = RowCache(folder / "cache")
    encode_prompts(base, source.prompts, "", EmbeddingCache(cache, encoders))
    encode_latents(source.split.train, config.data, config.seed, cache, encoder)
    encode_evaluation_latents(source.split.held_out, config.data, cache, encoder)
    return time.time() - begun_s, time.process_time() - begun_cpu_s


def compare(bench: Bench) -> bool:
    """Train in turns and print the ratios; True where all bars are met."""
    options, ours, theirs, compiled = bench.options, [], [], []
    MlflowClient(bench.store).search_experiments()  # its tables are made once in a store's life
    for turn in range(options.turns):
        ours.append(bench.ours(turn))
        print(line(f"ours, turn {turn}", ours[-1]), flush=True)
        if options.compile:
            compiled.append(bench.ours(turn, compiled=True))
            print(line(f"ours, turn {turn}, compiled", compiled[-1]), flush=True)
        runs = {workers: bench.theirs(turn, workers) for workers in options.workers}
        for workers, run in runs.items():
            print(line(f"script, turn {turn}, {workers} workers", run), flush=True)
        theirs.append(runs)
    tracked = bench.theirs(0, 0, tracked=True)
    print(line("script, 0 workers, in MLflow", tracked), flush=True)
    best = [min(runs.values(), key=lambda run: run.step_s) for runs in theirs]
    wall = statistics.median(mine.step_s / other.step_s for mine, other in zip(ours, best, strict=True))
    alone = [runs[min(runs)] for runs in theirs]  # workers' own processor time is not counted
    cpu = statistics.median(mine.step_cpu_s / other.step_cpu_s for mine, other in zip(ours, alone, strict=True))
    bar = STEP_BARS[options.case]
    good = [wall <= bar]
    print(f"step time: {wall:.2f} of the script's (at most {bar} wanted) {said(good[-1])}; processor time {cpu:.2f}")
    lowest, highest = min(run.peak_mib for runs in theirs for run in runs.values()), max(run.peak_mib for run in ours)
    memory = highest / lowest
    good.append(memory <= MEMORY_BAR)
    print(
        f"peak resident memory: {memory:.2f} of the script's (at most {MEMORY_BAR:g} wanted) {said(good[-1])}; "
        f"{highest / tracked.peak_mib:.2f} where it logs to MLflow too"
    )
    if compiled:
        ratio = statistics.median(one.step_s / plain.step_s for one, plain in zip(compiled, ours, strict=True))
        print(f"compiled: {ratio:.2f} of the plain step's time")
    warm_s, script_s = ours[-1].setup_s, best[-1].setup_s
    print(f"start to first step: cold {ours[0].setup_s:.1f} s, warm {warm_s:.1f} s; script {script_s:.1f} s")
    if best[-1].encoding_s:
        good.append(compare_warm_start(bench, best[-1]))
    return all(good)


def compare_warm_start(bench: Bench, script: Measured) -> bool:
    """Our whole way from files to latents with a warm cache, against the script's encoding passes."""
    wall_s, cpu_s = our_data_setup(bench.folder, RESOLUTION_PX[bench.options.case])
    ratio = script.encoding_s / wall_s
    good = ratio >= WARM_START_BAR
    print(
        f"warm start: {wall_s:.2f} s against {script.encoding_s:.2f} s of encoding: {ratio:.1f} times as fast "
        f"(at least {WARM_START_BAR:g} wanted) {said(good)}; processor time {script.encoding_cpu_s / cpu_s:.1f} times"
    )
    return good


def line(name: str, run: Measured) -> str:
    """One training."""
    return (
        f"{name:<28} {1e3 * run.step_s:7.1f} ms a step ({1e3 * run.step_cpu_s:.1f} ms of processor), first step after "
        f"{run.setup_s:.1f} s, {run.encoding_s:.1f} s of it encoding, {run.peak_mib:.0f} MiB"
    )


def main(arguments: Sequence[str]) -> int:
    """Run everything; 0 where all bars are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers-script", type=Path, required=True)
    parser.add_argument("--python-path", type=Path)
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--case", choices=tuple(STEP_BARS), default="tiny")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--compile", action="store_true", help="ours once more, with train.compile")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--photographs", type=int, default=96)
    options = parser.parse_args(arguments)
    options.diffusers_script = options.diffusers_script.resolve()
    print(machine("torch", "diffusers", "accelerate", "transformers"), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_base(folder / "base", options.case)
        write_photographs(folder / "photographs", options.case, options.photographs)
        return 0 if compare(Bench(folder, options)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
