"""`train`, with the peak memory of its phases beside what the plan says: a program of `benchmarks.real_size`.

python -m benchmarks.real_size_child FILE --config sdxl_lora_12gb ...
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from dfu_mlflow import entry, memory_limits
from dfu_mlflow.config import RunConfig
from dfu_mlflow.memory import GIB
from dfu_mlflow.memory_phases import RunMemory
from dfu_mlflow.phases import board
from entrypoints import train

POLL_S = 0.05
NAMES: Mapping[str, tuple[str, ...]] = {
    "encoding prompts": ("loading the text encoders", "encoding prompts"),
    "caching latents": ("loading the autoencoder", "caching latents"),
    "features of photographs": ("features of photographs",),
    "loading the UNet": ("loading the UNet",),
    "training": ("training",),
    "evaluation": ("sampling for evaluation", "validation loss"),
    "checkpoint": ("writing a checkpoint",),
    "registration": ("writing the sampler", "packaging and registering"),
    "smoke test": ("trying the version",),
}
"""Phase of the plan -> beginnings of what the run says that it is at."""


class Peaks(threading.Thread):
    """Resident memory of this process and its children, by the phase that is open."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.found: dict[str, float] = {}
        self.done = threading.Event()

    def run(self) -> None:
        """Until `done`."""
        own = psutil.Process()
        while not self.done.wait(POLL_S):
            names = [one.name for one in list(board()._open)]
            phase = next((plan for name in reversed(names) for plan in NAMES if name.startswith(NAMES[plan])), None)
            if phase is None:
                continue
            taken = own.memory_info().rss
            if phase == "smoke test":
                taken += sum(child.memory_info().rss for child in own.children(recursive=True))
            self.found[phase] = max(self.found.get(phase, 0.0), float(taken))


@contextmanager
def plans_kept() -> Iterator[list[RunMemory]]:
    """What the run itself estimates before it starts."""
    kept: list[RunMemory] = []
    original = memory_limits.require_memory

    def keeping(config: RunConfig, *rest: object) -> RunMemory | None:
        found = original(config, *rest)  # type: ignore[arg-type]
        kept.extend([found] if found is not None else [])
        return found

    import dfu_mlflow.pipeline as pipeline

    pipeline.require_memory = keeping  # type: ignore[assignment]
    try:
        yield kept
    finally:
        pipeline.require_memory = original


def main(arguments: Sequence[str]) -> int:
    """Train, and write the phases to FILE."""
    file, flags = Path(arguments[0]), arguments[1:]
    peaks = Peaks()
    peaks.start()
    with plans_kept() as plans:
        code = train.main(flags)
    peaks.done.set()
    peaks.join()
    planned = {phase.name: phase.on_host(plan.shared) for plan in plans for phase in plan.phases}
    both = {
        name: {"planned": size / GIB, "measured": peaks.found.get(name, 0.0) / GIB} for name, size in planned.items()
    }
    file.write_text(json.dumps(both, indent=1), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(entry.run(main, settings=RunConfig))
