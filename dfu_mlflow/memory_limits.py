"""What a machine has, and runs that do not fit it: refused before they start, with the settings that mend it."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from dfu_mlflow.base.load import resolve_base
from dfu_mlflow.config.load import merge, validate
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.errors import ConfigError, UserError
from dfu_mlflow.memory import GIB
from dfu_mlflow.memory_phases import CUDA_BYTES, PhaseMemory, RunMemory, libraries_bytes
from dfu_mlflow.runtime import release_memory

CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""Limit and use of the container that this process is in: version 2, version 1."""
MENDS: tuple[Mapping[str, Any], ...] = (
    {"ema.on_host": True},
    {"sampling.batch_size": 1},
    {"train.optimizer": "adafactor"},
    {"ema.enabled": False},
    {"train.gradient_checkpointing": True},
    {"train.batch_size": 1},
    {"train.fused_backward": True, "train.max_grad_norm": None, "train.gradient_accumulation_steps": 1},
    {"train.mixed_precision": "bf16"},
    {"adapter.frozen_dtype": "bfloat16"},
    {"adapter.method": "lora"},
    {"data.resolution_px": 512},
)
"""Settings that take less memory, those first whose effect is known at once."""
ADVICE_S = 45.0
"""Estimates at the real size take up to a minute each: by then the error is told without the rest of them."""
SMALL_BYTES, PLENTY_BYTES = 0.1 * GIB, 6 * GIB
"""Of a base's files, and of free memory, for which nothing is estimated."""

Estimate = Callable[[RunConfig, str, bool, float], RunMemory]


def free_host_bytes() -> float:
    """What this process can still take, and what it has already: of the machine, its container and its own limits."""
    own = psutil.Process().memory_info()
    free = [float(psutil.virtual_memory().available + psutil.swap_memory().free)]
    for limit, used in CGROUPS:
        if (most := _number(limit)) is not None and (now := _number(used)) is not None:
            free.append(most - now + _cached(limit.parent))
    for kind, taken in ((resource.RLIMIT_AS, own.vms), (resource.RLIMIT_DATA, own.rss)):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            free.append(float(soft - taken))
    return float(max(0.0, min(free)) + own.rss)


def free_device_bytes(device: torch.device) -> float:
    """What is free on a card, and what this process has there."""
    free, _ = torch.cuda.mem_get_info(device)
    return float(free) + float(torch.cuda.memory_reserved(device))


def require_memory(config: RunConfig, device: torch.device, estimate: Estimate) -> RunMemory | None:
    """Refuse what the system would kill; gives back the estimate, None where a small base needs none.

    Args:
        estimate: of the memory of what is about to be done.

    Raises:
        UserError: naming the largest phase, and settings with which it fits.
    """
    release_memory()  # what an earlier run of this process left is none of its libraries
    source, shared, libraries = resolve_base(config.base_model), device.type != "cuda", libraries_bytes()
    if shared and _plainly_fits(config, Path(source)):
        return None
    memory = estimate(config, source, shared, libraries)
    limits = Limits(config, free_host_bytes(), None if shared else free_device_bytes(device))
    lacking = limits.lacking(memory)
    if lacking is None:
        return memory
    advice = _advice(config, lambda other: limits.lacking(estimate(other, source, shared, libraries)) is None)
    raise UserError(f"{lacking}: {advice}")


def _plainly_fits(config: RunConfig, base: Path) -> bool:
    """A base of some ten million weights on a machine with plenty: an estimate would take longer than loading it."""
    if config.runtime.memory_limit_gib is not None or not base.is_dir():
        return False
    size = sum(file.stat().st_size for file in base.glob("*/*.safetensors"))
    return size < SMALL_BYTES and free_host_bytes() > PLENTY_BYTES


class Limits:
    """What a run may take.

    Args:
        config: `runtime.memory_limit_gib` may ask for less than there is.
        host: bytes.
        device: bytes on the card, None where there is none.
    """

    def __init__(self, config: RunConfig, host: float, device: float | None) -> None:
        asked = config.runtime.memory_limit_gib
        self.host = host if asked is None else min(host, asked * GIB)
        self.device = device

    def lacking(self, memory: RunMemory) -> str | None:
        """Why a run does not fit, None where it does."""
        phase = memory.largest_on_host()
        needed = phase.on_host(memory.shared)
        if needed > self.host:
            return _too_much(phase, needed, self.host, "this machine's memory", memory.shared)
        phase = memory.largest_on_device()
        needed = phase.on_device() + CUDA_BYTES
        if self.device is not None and needed > self.device:
            return _too_much(phase, needed, self.device, "the card", False)
        return None


def _too_much(phase: PhaseMemory, needed: float, free: float, where: str, shared: bool) -> str:
    parts = {**phase.device, **phase.host} if shared else phase.host if "machine" in where else phase.device
    largest = sorted(parts.items(), key=lambda item: -item[1])[:4]
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    return (
        f"it would take {needed / GIB:.1f} GiB of {where} while {phase.name} ({listed}), and {free / GIB:.1f} GiB can "
        "be had"
    )


def _advice(config: RunConfig, fits: Callable[[RunConfig], bool]) -> str:
    """The fewest changes with which it fits: one that is enough by itself, else several together."""
    together: dict[str, Any] = {}
    untried: list[Mapping[str, Any]] = []
    end_s = time.monotonic() + ADVICE_S
    for change in _changes(config):
        if time.monotonic() > end_s:
            untried.append(change)
            continue
        if fits(_changed(config, change)):
            return f"it fits with {_flags(change)}"
        together |= change
        if len(together) > len(change) and _valid(config, together) and fits(_changed(config, together)):
            return f"it fits with {_flags(together)}"
    if untried:
        return f"these take less, and were not tried in time: {', '.join(map(_flags, untried))}"
    return "no setting mends that here: take a machine with more memory"


def _changes(config: RunConfig) -> Iterator[Mapping[str, Any]]:
    """Those that change something and make a configuration that is allowed."""
    for change in MENDS:
        if _valid(config, change) and _changed(config, change) != config:
            yield change


def _valid(config: RunConfig, change: Mapping[str, Any]) -> bool:
    try:
        _changed(config, change)
    except ConfigError:
        return False
    return True


def _changed(config: RunConfig, change: Mapping[str, Any]) -> RunConfig:
    tree = config.model_dump(mode="json")
    for name, value in change.items():
        section, _, field = name.partition(".")
        tree = merge(tree, {section: {field: value}})
    return validate(RunConfig, tree)


def _flags(change: Mapping[str, Any]) -> str:
    shown = {True: "true", False: "false", None: "null"}
    return " ".join(f"--{name} {shown.get(value, value)}" for name, value in change.items())


def _number(file: Path) -> float | None:
    """`max` and files that are not there are no limit."""
    try:
        return float(file.read_text())
    except (OSError, ValueError):
        return None


def _cached(group: Path) -> float:
    """What a container's use counts of files that were read: it is given back when memory is asked for."""
    try:
        lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0.0
    return float(lines.get("inactive_file", lines.get("total_inactive_file", 0)))
