"""Device, dtype, random generators and provenance."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import MappingProxyType, MethodType
from typing import TypeVar

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn

from dfu_mlflow.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
HALF = MappingProxyType({"bf16": torch.bfloat16, "fp16": torch.float16})
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "mlflow", "numpy")


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where it works, else the CPU.

    Raises:
        UserError: for a device that torch does not know, or that is not here.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if cards else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown; give auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= cards:
        raise UserError(f"--device {name}: torch finds {cards} CUDA devices here; --device auto takes what there is")
    return device


def make_current(device: torch.device) -> torch.device:
    """Let `cuda` without a number mean this card from now on: accelerate asks for it that way.

    Raises:
        UserError: for one card by its number where several processes run, each on its own.
    """
    if device.index is not None and device.type == "cuda":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(f"--device {device}: several processes run, each on a card of its own; leave it at auto")
        torch.cuda.set_device(device)
    return device


def use_precision(network: nn.Module, device: torch.device, mixed_precision: str) -> None:
    """Run a network under autocast, its answers in float32, as accelerate's `prepare_model` makes it.

    Not by accelerate, which knows one precision a process: another part of this one may have been first.
    """
    if mixed_precision in HALF:
        halved = torch.autocast(device.type, dtype=HALF[mixed_precision])(type(network).forward)
        network.forward = MethodType(convert_outputs_to_fp32(halved), network)


def in_slices(rows: int, size: int, work: Callable[[slice], T]) -> list[T]:
    """What `work` gives for slices of up to `size` rows; where the device's memory is too small, for smaller ones.

    Raises:
        torch.OutOfMemoryError: where one row is too much.
    """
    done: list[T] = []
    start = 0
    while start < rows:
        part = slice(start, min(start + size, rows))
        try:
            done.append(work(part))
        except torch.OutOfMemoryError:
            if part.stop - part.start == 1:
                raise
            size = (part.stop - part.start) // 2
        else:
            start = part.stop
            continue
        release_memory()  # outside of `except`, whose traceback holds on to what was computed
        logger.warning("out of memory with %d rows at once: going on with %d", part.stop - part.start, size)
    return done


def release_memory() -> None:
    """Give back what nobody holds any more, to the system too; trainings are full of cycles."""
    gc.collect()
    torch.cuda.empty_cache()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # glibc's alone keeps it otherwise
        trim(0)


def require_compiler(flag: str) -> None:
    """`torch.compile` builds C++ for a CPU, and the launcher of its kernels for a GPU.

    Raises:
        UserError: naming the flag that asks for it, where no compiler is found.
    """
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(f"--{flag} needs a C++ compiler: install g++, or name one in CXX")


def pick_devices(names: str) -> tuple[torch.device, ...]:
    """Several, with commas; `auto` is every CUDA device, else the CPU.

    Raises:
        UserError: as `pick_device`.
    """
    if names == "auto" and torch.cuda.is_available():
        return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    return tuple(pick_device(name.strip()) for name in names.split(","))


def derive_seed(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit seed from (seed, purpose, index): the same on every rank, after every restart."""
    text = ":".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A CPU generator for one purpose and one index; see `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *index))


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on a device; a GPU copies it out of pinned memory while the CPU goes on."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def provenance() -> dict[str, str]:
    """Versions, machine and git revision of the code, as tags."""
    tags = {f"version.{name}": metadata.version(name) for name in PACKAGES}
    tags["version.python"] = platform.python_version()
    tags["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        tags["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    tags["git.revision"] = _git_revision(Path(__file__).resolve().parent.parent)
    return tags


def _git_revision(folder: Path) -> str:
    try:
        revision = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown (not a git checkout)"
    return revision.stdout.strip()
