"""How much memory each phase of a case took, on the card and beside it, and what the plan says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import psutil
import torch

from dfu_mlflow.base.load import resolve_base
from dfu_mlflow.config import RunConfig
from dfu_mlflow.memory import GIB
from dfu_mlflow.memory_phases import run_memory

POLL_S = 0.2


class Peaks:
    """The most memory that was taken inside named phases, and their seconds.

    Figures of a phase: `seconds`; `host_gib`, the process's resident memory; on a card also `allocated_gib` (tensors)
    and `reserved_gib` (what torch holds) of this process, and `card_gib`, of everything on the card, so that it also
    has what CUDA itself takes and what other processes do. Host and whole card are looked at five times a second.

    Args:
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phases: dict[str, dict[str, float]] = {}
        self._inside = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside. Of a phase that comes again seconds are summed and the larger peaks kept."""
        if self._inside:  # a part of another phase
            yield
            return
        self._inside = True
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        polled = _Poll(self.device)
        polled.start()
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self._inside = False
            self._note(name, start_s, polled)

    def wait(self) -> None:
        """Until the card has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def around(self, owner: Any, name: str, phase: str) -> Iterator[None]:
        """Inside the block every call of `owner.name` is a phase."""
        original = getattr(owner, name)

        @wraps(original)
        def measured(*arguments: Any, **named: Any) -> Any:
            with self.phase(phase):
                return original(*arguments, **named)

        setattr(owner, name, measured)
        try:
            yield
        finally:
            setattr(owner, name, original)

    def _note(self, name: str, start_s: float, polled: _Poll) -> None:
        found: dict[str, float] = {}
        try:
            self.wait()
        finally:  # after an error of the card, too, the thread ends
            found |= polled.stop()
        seconds = time.perf_counter() - start_s
        if self.device.type == "cuda":
            found["allocated_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
            found["reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / GIB
        known = self.phases.get(name, {})
        found = {key: max(value, known.get(key, 0.0)) for key, value in found.items()}
        self.phases[name] = {"seconds": seconds + known.get("seconds", 0.0), **found}


class _Poll(threading.Thread):
    """Looks at the host and the whole card until it is stopped."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(daemon=True)
        self.device = device
        self.process = psutil.Process()
        self.found: dict[str, float] = {}
        self.done = threading.Event()

    def run(self) -> None:
        """Until `stop`."""
        while not self.done.wait(POLL_S):
            self.look()

    def stop(self) -> dict[str, float]:
        """End, and give back the peaks [GiB]."""
        self.done.set()
        self.join()
        self.look()
        return self.found

    def look(self) -> None:
        """Once."""
        seen = {"host_gib": self.process.memory_info().rss / GIB}
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            seen["card_gib"] = (total - free) / GIB
        self.found = {name: max(value, self.found.get(name, 0.0)) for name, value in seen.items()}


def planned_gib(config: RunConfig) -> float:
    """What the plan says that training takes on the device [GiB]: the one place that reads a plan here."""
    memory = run_memory(config, resolve_base(config.base_model), shared=False, libraries=0.0)
    return next(phase.on_device() for phase in memory.phases if phase.name == "training") / GIB


def timed(work: Callable[[], object], wait: Callable[[], None], at_least_s: float, at_least: int) -> tuple[int, float]:
    """Repeat work until both are reached; how often, and seconds in all."""
    wait()
    start_s, count = time.perf_counter(), 0
    while count < at_least or time.perf_counter() - start_s < at_least_s:
        work()
        count += 1
    wait()
    return count, time.perf_counter() - start_s
