"""What other work on the machine costs a training step: `python -m benchmarks.busy_machine` prints ratios of one run.

Forward and backward of 16 rows of the embedded base, on an idle machine, beside one busy loop and beside a second
training of lower priority (nice 10), with libgomp's own way to wait and with `threading_policy`'s. Whatever is beside
the step is halted outside of its turns; turns are interleaved. A second training waits as the first does.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from benchmarks.machine import machine, said
from dfu_mlflow.threading_policy import CHOSEN_BY_USER, adapt_waiting

WORLDS = ("idle", "busy loop", "second training")
POLICIES = ("spinning", "asleep", "adapted")
"""libgomp's own; OMP_WAIT_POLICY=passive; ours."""
IDLE_BAR = 1.05
BUSY_BAR = 3.0
ROWS = 16
SETTLE_S = 3.0
"""What a turn runs before its steps count: long enough to notice that the machine has become idle again."""


def serve_steps() -> None:
    """For each number on stdin take that many steps, always from the same start; answer with seconds and losses."""
    import torch

    from dfu_mlflow.base.load import load_base

    unet = load_base("tiny_sdxl").unet.requires_grad_(True)
    start = {name: value.clone() for name, value in unet.state_dict().items()}
    source = torch.Generator().manual_seed(0)
    sizes = unet.config
    latents = torch.randn(ROWS, sizes.in_channels, 16, 16, generator=source)
    text = torch.randn(ROWS, 77, sizes.cross_attention_dim, generator=source)
    pooled_width = sizes.projection_class_embeddings_input_dim - 6 * sizes.addition_time_embed_dim
    pooled = torch.randn(ROWS, pooled_width, generator=source)
    added = {"text_embeds": pooled, "time_ids": torch.full((ROWS, 6), 64.0)}
    optimizer = torch.optim.SGD(unet.parameters(), 1e-3)

    def step() -> float:
        noise = unet(latents, torch.arange(ROWS) * 50, text, added_cond_kwargs=added).sample
        loss = (noise - latents).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    print(json.dumps({"losses": [step()]}), flush=True)
    for line in sys.stdin:
        until_s = time.perf_counter() + SETTLE_S
        while time.perf_counter() < until_s:
            step()
        unet.load_state_dict(start)
        seconds, losses = [], []
        for _ in range(int(line)):
            start_s = time.perf_counter()
            losses.append(step())
            seconds.append(time.perf_counter() - start_s)
        print(json.dumps({"seconds": seconds, "losses": losses}), flush=True)


class Training:
    """A process that trains when it is told to.

    Args:
        policy: of `POLICIES`.
        nice: added to its niceness.
    """

    def __init__(self, policy: str, nice: int = 0) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USER}
        environment |= {"OMP_WAIT_POLICY": "passive"} if policy == "asleep" else {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.busy_machine", "--training", policy, "--nice", str(nice)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def ask(self, steps: int) -> None:
        """Tell it to take this many steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, list[float]]:
        """Wait for `seconds` and `losses` of the steps it was told to take."""
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))


class Neighbours:
    """What runs beside a step, started once and halted until it is its turn."""

    def __init__(self) -> None:
        self._loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        self._loop.send_signal(signal.SIGSTOP)
        self._trainings = {policy: Training(policy, nice=10) for policy in POLICIES}
        for training in self._trainings.values():
            training.process.send_signal(signal.SIGSTOP)
            training.ask(10**9)
        self.processes = [self._loop, *(training.process for training in self._trainings.values())]

    @contextmanager
    def beside(self, world: str, policy: str) -> Iterator[None]:
        """Inside the block the machine is as the world says."""
        if world == "idle":
            yield
            return
        process = self._loop if world == "busy loop" else self._trainings[policy].process
        process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            process.send_signal(signal.SIGSTOP)


def measure(turns: int, steps: int) -> tuple[dict[tuple[str, str], list[float]], set[tuple[float, ...]]]:
    """Seconds of the steps by (world, policy), and the different rows of losses that came out."""
    seconds: dict[tuple[str, str], list[float]] = {(world, policy): [] for world in WORLDS for policy in POLICIES}
    losses = set()
    neighbours = Neighbours()
    trainings = {policy: Training(policy) for policy in POLICIES}
    try:
        for _ in range(turns):
            for world, policy in seconds:
                with neighbours.beside(world, policy):
                    trainings[policy].ask(steps)
                    answer = trainings[policy].answer()
                seconds[world, policy] += answer["seconds"]
                losses.add(tuple(answer["losses"]))
    finally:
        for process in [*neighbours.processes, *(training.process for training in trainings.values())]:
            process.kill()
            process.wait()
    return seconds, losses


def show(seconds: dict[tuple[str, str], list[float]]) -> bool:
    """Print the table; True where our way to wait meets its bars."""
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    idle_s = medians["idle", "spinning"]
    print("| step, s (of spinning on the idle machine) | " + " | ".join(WORLDS) + " |\n|---" + "|---" * 3 + "|")
    for policy in POLICIES:
        cells = (f"{medians[world, policy]:.3f} ({medians[world, policy] / idle_s:.2f})" for world in WORLDS)
        print(f"| {policy} | " + " | ".join(cells) + " |")
    ratios = {world: medians[world, "adapted"] / idle_s for world in WORLDS}
    good = all(ratio <= (IDLE_BAR if world == "idle" else BUSY_BAR) for world, ratio in ratios.items())
    print(f"adapted: at most {IDLE_BAR:g} wanted on the idle machine and {BUSY_BAR:g} beside other work {said(good)}")
    return good


def main(arguments: Sequence[str]) -> int:
    """Run everything; 0 where all bars are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--training", choices=POLICIES, help=argparse.SUPPRESS)
    parser.add_argument("--nice", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.training:
        os.nice(options.nice)
        if options.training == "adapted":
            adapt_waiting()
        serve_steps()
        return 0
    print(machine("torch"), flush=True)
    seconds, losses = measure(options.turns, options.steps)
    good = show(seconds)
    print(f"losses equal to the digit everywhere {said(len(losses) == 1)}")
    return 0 if good and len(losses) == 1 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
