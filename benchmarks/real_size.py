"""Stable Diffusion XL at its real size, from photographs to a served picture: time and peak memory of every command.

    python -m benchmarks.real_size [--base FOLDER] [--photographs FOLDER] [--out FOLDER] [--commands train,evaluate]

Without a base it makes one of the real architecture with random weights (7 GB). Everything runs as a user runs it, one
process at a time: `train` (LoRA), `evaluate`, `diagnose`, `promote`, `sample`, `mlflow models serve`, `serve`, and
`train` of all weights. Peak memory is the kernel's own figure of the largest process (`ru_maxrss`), and beside it the
most that the command and its children had together. `train` is also held against its plan, phase by phase.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
import torch

from benchmarks.cuda_base import REAL, write_random_base
from benchmarks.real_size_process import Address, Run, free_port, run_to_its_end, serve_one

SIZE = {
    "--data.resolution_px": "128",
    "--data.views_per_image": "1",
    "--data.group_by": "none",
    "--train.epochs": "1",
    "--train.steps_per_epoch": "3",
    "--train.gradient_accumulation_steps": "1",
    "--evaluation.samples": "12",
    "--evaluation.grid_per_class": "2",
    "--evaluation.validation_images": "8",
    "--evaluation.validation_timesteps": "4",
    "--evaluation.success": "null",
    "--metrics.extractor_size_px": "96",
    "--sampling.num_inference_steps": "4",
    "--sampling.batch_size": "6",
}
"""Small where only repetition would be large: what a step, a picture and a file take is that of the real size."""
PHANTOM = {"--data.root": "phantom", "--data.phantom.patients": "8", "--data.group_by": None}
FEW = ("--memorisation.neighbours", "10")
SPLIT = ("--data.validation_fraction", "0.4", *FEW)
"""So that of a few dozen photographs enough are held out to measure distances, and enough trained to find copies."""
SAMPLE = ("--sample.per_class", "2", "--num_inference_steps", "4", "--sample.filter_colour", "false", *FEW)
"""Colours of a random base's pictures are not held against it."""
FULL = ("--ema.enabled", "false", "--checkpoint.keep_last", "1")
DIAGNOSE = ("--budget", "full", "--sampling.num_inference_steps", "1")
"""Guidance is swept over several hundred pictures."""
LIMIT_GB = {"train, all weights": 20.0}
OTHER_LIMIT_GB = 12.0
REFUSED = 3
COMMANDS = ("train", "evaluate", "diagnose", "promote", "sample", "models-serve", "serve", "train-full")


@dataclass(frozen=True)
class Place:
    """Where everything lies.

    Attributes:
        base: folder in diffusers layout.
        photographs: None for the embedded ones.
        out: of runs, the store and logs.
    """

    base: Path
    photographs: Path | None
    out: Path

    def environment(self) -> dict[str, str]:
        """Of every command: a store and a cache of their own."""
        store = f"sqlite:///{self.out}/mlflow.db"
        return {**os.environ, "MLFLOW_TRACKING_URI": store, "XDG_CACHE_HOME": str(self.out / "cache")}

    def flags(self) -> list[str]:
        """What every training says."""
        data = PHANTOM if self.photographs is None else {"--data.root": str(self.photographs)}
        chosen = {**SIZE, "--base_model": str(self.base), **data}
        return [*SPLIT, *(word for name, value in chosen.items() if value is not None for word in (name, value))]

    def last_run(self) -> str:
        """Id of the run that was trained last."""
        mlflow.set_tracking_uri(self.environment()["MLFLOW_TRACKING_URI"])
        runs = mlflow.search_runs(
            search_all_experiments=True, filter_string="tags.best.epoch != ''", output_format="list"
        )
        return str(runs[0].info.run_id)


def program(name: str, *arguments: str) -> list[str]:
    """An entry point's command line."""
    return [sys.executable, "-m", f"entrypoints.{name}", *arguments]


def run(command: str, place: Place) -> Run:
    """One command as a user types it, to its end, or until it has answered one request."""
    model = "models:/dfu-sampler@challenger"
    environment, log = place.environment(), place.out / f"{command}.log"
    training = [sys.executable, "-m", "benchmarks.real_size_child", str(place.out / f"{command}.json")]
    if command == "train":
        flags = ["--config", "sdxl_lora_12gb", *place.flags(), "--output_dir", str(place.out / "lora")]
        return run_to_its_end(command, [*training, *flags], environment, log)
    if command == "train-full":
        flags = ["--config", "sdxl_full_24gb", *place.flags(), "--output_dir", str(place.out / "full")]
        return run_to_its_end("train, all weights", [*training, *flags, *FULL], environment, log)
    if command in ("evaluate", "diagnose", "promote", "sample"):
        arguments: Mapping[str, Sequence[str]] = {
            "evaluate": ("--source", place.last_run(), *SPLIT, "--output_dir", str(place.out / "evaluate")),
            "diagnose": ("--run", place.last_run(), *DIAGNOSE, *SPLIT, "--output_dir", str(place.out / "diagnose")),
            "promote": ("--model", model, *SPLIT, "--output_dir", str(place.out / "promote")),
            "sample": ("--model", model, *SAMPLE, "--output_dir", str(place.out / "samples")),
        }
        return run_to_its_end(command, program(command, *arguments[command]), environment, log)
    port = free_port()
    if command == "serve":
        typed = program("serve", "--model", model, "--serve.port", str(port))
        request = {"rows": [{"phase": phase_of(place)}], "params": {"num_inference_steps": 4}}
        return serve_one(command, typed, environment, log, Address(port, "/ready", "/v1/images"), request)
    typed = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
    rows = {"dataframe_records": [{"phase": phase_of(place)}], "params": {"num_inference_steps": 4}}
    typed += ["-p", str(port), "-t", "600"]
    return serve_one("mlflow models serve", typed, environment, log, Address(port, "/ping", "/invocations"), rows)


def phase_of(place: Place) -> str:
    """A class that the model draws."""
    return "I" if place.photographs is None else min(each.name for each in place.photographs.iterdir() if each.is_dir())


def row(done: Run) -> str:
    """A line of the table in docs/performance.md."""
    limit = LIMIT_GB.get(done.name, OTHER_LIMIT_GB)
    kept = "yes" if done.good(REFUSED if done.name == "promote" else 0) and done.peak_gb <= limit else "NO"
    return (
        f"| {done.name} | {done.code} | {done.seconds:.0f} s | {done.peak_gb:.1f} GB | {done.tree_gb:.1f} GB | "
        f"{limit:.0f} GB: {kept} | {done.silence_s:.0f} s after {done.silent_after!r} |"
    )


def phase_rows(file: Path) -> list[str]:
    """Planned and measured peak of each phase of a training, in GiB."""
    if not file.is_file():
        return []
    phases = json.loads(file.read_text(encoding="utf-8"))
    lines = ["", f"| phase of `{file.stem}` | planned | measured | measured / planned |", "|---|---|---|---|"]
    for name, both in phases.items():
        ratio = both["measured"] / both["planned"] if both["planned"] else float("nan")
        lines.append(f"| {name} | {both['planned']:.2f} | {both['measured']:.2f} | {ratio:.2f} |")
    return lines


def main(arguments: Sequence[str]) -> int:
    """Run the commands, print a line of each as it ends; 0 where all kept their limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        out = (chosen.out or Path(temporary)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        base = chosen.base or out / "base"
        if not (base / "model_index.json").is_file():
            write_random_base(base, REAL, torch.device("cpu"))
        place = Place(base.resolve(), chosen.photographs, out)
        print("| command | exit | time | peak, largest process | with its children | limit kept | longest silence |")
        print("|---|---|---|---|---|---|---|", flush=True)
        rows = []
        for command in chosen.commands.split(","):
            rows.append(row(run(command, place)))
            print(rows[-1], flush=True)
        for command in ("train", "train-full"):
            print("\n".join(phase_rows(out / f"{command}.json")))
    return int(any(": NO" in line for line in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
