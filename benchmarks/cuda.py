"""The first card: steps, pictures, memory against the plan, and the whole chain, at Stable Diffusion XL's real size.

    python -m benchmarks.cuda [--minutes 10] [--cases lora_12gb chain ...] [--json outputs/cuda.jsonl]
    python -m benchmarks.cuda --device cpu --small        # every line of it on a CPU, with a small base

Makes a random base of the real architecture on the card (7 GB of fp16 safetensors; nothing is downloaded, its pictures
are noise) and works on it with the project's own loading, training, registering and sampling:

- training steps of the presets for LoRA and full fine-tuning at 512 and 1,024 px: images/s, share of the card's bf16
  rate (operations of forward and backward pass x images/s / rate of a large bf16 matrix product on this card), peak
  memory by phase against what `--dry-run` plans, seconds from the process's start to its first step;
- pictures/s at both sizes; a step through `torch.compile`; updates by fused, foreach and 8-bit AdamW and Adafactor;
- the chain once: train three steps at 512 px, register, sample, each phase with its seconds and peak.

Each case runs in a process of its own, so that peaks are its own. What does not fit into the time is skipped or cut
off, and said. Every figure is printed, and written as one line of JSON, as soon as it is there.
Needs about 40 GB of disk in --folder and 20 GB of the computer's memory. Ends with 1 where a case failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda_base import REAL, SMALL
from benchmarks.cuda_cases import BASE, CASES, Case, Request, case_config
from benchmarks.cuda_flops import picture_flops
from benchmarks.cuda_lines import lines
from benchmarks.cuda_memory import planned_gib
from benchmarks.cuda_process import run_child
from benchmarks.machine import machine

Figures = dict[str, Any]
FIRST_START_S = {False: 60.0, True: 15.0}
"""What a start-up is taken for before one was measured: at the real size, and with --small."""
MEASURED_S = {False: 12.0, True: 0.5}
"""Steady work of a case."""


@dataclass
class Bench:
    """What is known so far.

    Attributes:
        options: the command line.
        folder: of everything that is written.
        ends_s: when the time is up, by `time.monotonic`.
        rate: of a bf16 matrix product [FLOP/s]; 0 before it is known.
        total_gib: the card's memory; None on a CPU.
        start_s: longest start-up so far.
        outcomes: case -> how it ended.
    """

    options: argparse.Namespace
    folder: Path
    ends_s: float
    rate: float = 0.0
    total_gib: float | None = None
    start_s: float = 0.0
    outcomes: dict[str, str] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        """Time that is left [s]."""
        return self.ends_s - time.monotonic()

    def request(self, case: Case | None) -> Request:
        """What the child is told; None makes the base."""
        small = self.options.small
        sizes = (SMALL if small else REAL).sizes_px
        px = sizes[case.high if case else 0]
        name = case.name if case else BASE
        return Request(name, str(self.folder), self.options.device, px, MEASURED_S[small], small)

    def lacks_time(self, case: Case) -> str:
        """Why a case is not begun, empty where it is."""
        needed_s = case.starts * (self.start_s or FIRST_START_S[self.options.small]) + MEASURED_S[self.options.small]
        if self.left_s >= needed_s:
            return ""
        return f"{max(self.left_s, 0):.0f} s are left, it would take about {needed_s:.0f} s (--minutes)"

    def environment(self) -> dict[str, str]:
        """Of the children: a tracking store of their own, and no network."""
        store = f"sqlite:///{self.folder}/mlflow.db"
        own = {"MLFLOW_TRACKING_URI": store, "MLFLOW_DISABLE_TELEMETRY": "true"}
        own |= dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        return {**kept, **own}


@dataclass(frozen=True)
class Estimate:
    """What a case's figures are held against.

    Attributes:
        planned_gib: training's memory on the card by the plan.
        forward, step: FLOPs of a picture, forward alone and with its backward pass.
    """

    planned_gib: float
    forward: float
    step: float


def estimate(request: Request) -> Estimate:
    """Plan and count a case, on shapes alone."""
    config = case_config(request)
    return Estimate(planned_gib(config), *picture_flops(config))


def held_against(figures: Figures, promised: Future[Estimate] | None, bench: Bench) -> Figures:
    """A case's figures with their share of the card's rate, and peaks with their ratio to the plan."""
    if promised is None or not {"images_per_s", "pictures_per_s"} & set(figures):
        return figures
    if (error := promised.exception()) is not None:  # what was measured on a card is worth more than what it is held to
        return figures | {"estimate_failed": repr(error)}
    known = promised.result()
    if "images_per_s" in figures:
        phases = figures["phases"].values()
        peak = max((phase["allocated_gib"] for phase in phases if "allocated_gib" in phase), default=None)
        steps = figures["phases"]["steps"].get("allocated_gib")
        figures |= {"flops_per_image": known.step, "bf16_share": figures["images_per_s"] * known.step / bench.rate}
        figures |= {"planned_gib": known.planned_gib, "peak_gib": peak}
        figures |= {"steps_over_plan": None if steps is None else steps / known.planned_gib}
    if "pictures_per_s" in figures:
        work = known.forward * figures["unet_passes"]
        figures |= {"flops_per_picture": work, "bf16_share": figures["pictures_per_s"] * work / bench.rate}
    return figures


def run_one(bench: Bench, case: Case | None, known: Future[Estimate] | None, tell: Callable[[Figures], None]) -> None:
    """Run a child to its end and hand its figures on as they come."""
    name = case.name if case else BASE
    ended = False

    def take(figures: Figures) -> None:
        nonlocal ended
        bench.rate = figures.get("bf16_flops_per_s", bench.rate)
        bench.total_gib = figures.get("total_gib", bench.total_gib)
        bench.start_s = max(bench.start_s, figures.get("start_s", 0.0))
        ended |= bool({"skipped", "out_of_memory"} & set(figures)) and "optimizer" not in figures
        if ended:
            bench.outcomes[name] = "skipped" if "skipped" in figures else "out of memory"
        tell({"case": name, **held_against(figures, known, bench)})

    bench.outcomes[name] = "measured"
    log = bench.folder / f"{name}.log"
    code = run_child(bench.request(case), bench.environment(), log, bench.left_s, take)
    if code == 0 or ended:
        return
    if bench.left_s <= 0:
        bench.outcomes[name] = "cut off"
        tell({"case": name, "cut_off": "the time is up (--minutes)"})
        return
    bench.outcomes[name] = "failed"
    said = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    tell({"case": name, "failed": f"exit code {code}", "log": said})


def run_all(bench: Bench, cases: Sequence[Case], tell: Callable[[Figures], None]) -> None:
    """Make the base, then run the cases in their order while there is time."""
    run_one(bench, None, None, tell)
    if bench.outcomes[BASE] != "measured":
        return
    with ThreadPoolExecutor(1, "estimate") as pool:  # beside the children, which load their base meanwhile
        known = {case.name: pool.submit(estimate, bench.request(case)) for case in cases if compared(case)}
        for case in cases:
            reason = bench.lacks_time(case)
            plan = known.get(case.name)
            reason = reason or lacks_memory(case, plan, bench.total_gib)
            if reason:
                bench.outcomes[case.name] = "skipped"
                tell({"case": case.name, "skipped": reason})
                continue
            run_one(bench, case, plan, tell)
        pool.shutdown(wait=False, cancel_futures=True)


def lacks_memory(case: Case, promised: Future[Estimate] | None, total_gib: float | None) -> str:
    """Why a training is not begun, empty where it is. The first cases are begun before their plan is known."""
    if case.kind != "training" or total_gib is None or promised is None or not promised.done() or promised.exception():
        return ""
    planned = promised.result().planned_gib
    return f"the plan is {planned:.1f} GiB, the card has {total_gib:.1f}" if planned > total_gib else ""


def compared(case: Case) -> bool:
    """Whether there is a plan or a count to hold the case against."""
    return case.kind in ("training", "sampling")


def chosen(names: Sequence[str]) -> list[Case]:
    """Cases whose names begin with one of these; none chooses all.

    Raises:
        SystemExit: where a name chooses nothing.
    """
    for name in names:
        if not any(case.name.startswith(name) for case in CASES):
            raise SystemExit(f"--cases {name}: no such case; there are {', '.join(case.name for case in CASES)}")
    return [case for case in CASES if not names or any(case.name.startswith(name) for name in names)]


def main(arguments: Sequence[str]) -> int:
    """Run everything; 0 where no case failed, 1 where one did, 2 without a card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="when it ends, whatever is done (default: 10)")
    parser.add_argument("--cases", nargs="+", default=[], help=", ".join(case.name for case in CASES))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 ... (default: cuda); cpu with --small")
    parser.add_argument("--small", action="store_true", help="a base of a half million weights, at 64 and 128 px")
    parser.add_argument("--json", type=Path, default=Path("outputs/cuda.jsonl"), help="default: outputs/cuda.jsonl")
    parser.add_argument("--folder", type=Path, help="where bases and runs are written (default: a temporary folder)")
    options = parser.parse_args(arguments)
    cases = chosen(options.cases)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu --small runs everything on a small base", file=sys.stderr)
        return 2
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu needs --small: the real size takes hours there")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    print(machine("torch", "diffusers", "accelerate", "transformers", "peft"), flush=True)
    with (
        tempfile.TemporaryDirectory(dir=options.folder, prefix="benchmark-cuda-") as folder,
        options.json.open("w", encoding="utf-8") as file,
    ):

        def tell(figures: Figures) -> None:
            print(json.dumps(figures), file=file, flush=True)
            for line in lines(figures):
                print(line, flush=True)

        bench = Bench(options, Path(folder), time.monotonic() + 60 * options.minutes)
        tell({"case": "machine", "on": machine("torch", "diffusers"), "small": options.small})
        run_all(bench, cases, tell)
    print("; ".join(f"{name}: {outcome}" for name, outcome in bench.outcomes.items()))
    print(f"figures: {options.json}")
    return 1 if "failed" in bench.outcomes.values() else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a child and 40 GB of files do not outlive it
    sys.exit(main(sys.argv[1:]))
