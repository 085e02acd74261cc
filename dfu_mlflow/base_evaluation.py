"""What an evaluation of the untouched base saw, kept in the cache: the next run on it draws nothing anew.

Pictures, losses and features are those that this machine would compute again, to the bit: the key names the code, the
libraries, the processor or card, and the number of threads, beside everything that the figures depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dfu_mlflow.data.packs import make_private_folder
from dfu_mlflow.evaluator import Drawn, Observation
from dfu_mlflow.runtime import provenance

Seen = tuple[Observation | None, Observation | None]
"""In full, and as quick evaluations see it."""

WORTH_S = 30.0
"""An evaluation that takes less is not kept."""
NAMES = ("full", "quick")
ROOT = Path(__file__).resolve().parent


def seen_before(folder: Path, facts: str, device: torch.device, observe: Callable[[], Seen]) -> Seen:
    """What `observe` gives, or gave before on this machine for the same facts.

    Args:
        folder: of the cache.
        facts: everything about base, photographs and settings that it depends on.
        device: that it runs on.
    """
    place = folder / "base_evaluations" / f"{_key(facts, device)}.safetensors"
    try:
        stored = load_file(place)
        os.utime(place)
        return _part(stored, "full"), _part(stored, "quick")
    except (OSError, SafetensorError, KeyError):
        began_s = time.monotonic()
        seen = observe()
    if time.monotonic() - began_s >= WORTH_S:
        _keep(place, seen)
    return seen


def _key(facts: str, device: torch.device) -> str:
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    tags = provenance()
    versions = {name: value for name, value in tags.items() if name.startswith("version.")}
    machine = [platform.machine(), card, torch.get_num_threads()]
    code = hashlib.sha256()
    for file in sorted(ROOT.rglob("*.py")):
        code.update(file.read_bytes())
    text = json.dumps([facts, versions, machine, code.hexdigest()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _keep(place: Path, seen: Seen) -> None:
    """Written beside and renamed; a cache that cannot be written costs the same time again, and no run."""
    tensors: dict[str, torch.Tensor] = {}
    for name, observation in zip(NAMES, seen, strict=True):
        if observation is not None:
            drawn = observation.drawn
            tensors |= {
                f"{name}.losses": observation.losses,
                f"{name}.images": torch.from_numpy(drawn.images),
                f"{name}.class_ids": drawn.class_ids,
                f"{name}.counted": drawn.counted,
            }
            tensors |= {f"{name}.features.{at}": rows for at, rows in enumerate(observation.features)}
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        make_private_folder(place.parent)
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, beside)  # some are shared
        beside.replace(place)
    except (OSError, SafetensorError):
        beside.unlink(missing_ok=True)


def _part(stored: dict[str, torch.Tensor], name: str) -> Observation | None:
    if f"{name}.losses" not in stored:
        return None
    features = sorted(
        (key for key in stored if key.startswith(f"{name}.features.")), key=lambda key: int(key.rpartition(".")[2])
    )
    drawn = Drawn(stored[f"{name}.images"].numpy(), stored[f"{name}.class_ids"], stored[f"{name}.counted"])
    return Observation(stored[f"{name}.losses"], drawn, tuple(stored[key] for key in features))
