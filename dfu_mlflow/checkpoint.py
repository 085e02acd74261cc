"""Checkpoints: written whole beside the old ones, then renamed. Safetensors for tensors, JSON for the rest."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dfu_mlflow.documents import FORMAT, read_document
from dfu_mlflow.errors import UserError
from dfu_mlflow.fused import BackwardOptimizer

logger = logging.getLogger(__name__)

STATE = "state.json"
PARTIAL = ".partial-"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        weights: what learns, by name.
        ema: its moving average, empty without one.
        optimizer: the optimizer's tensors, named `PARAMETER INDEX.KEY`.
        state: step, epoch, counters, configuration and everything else that is not a tensor.
    """

    weights: Tensors
    ema: Tensors
    optimizer: Tensors
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: `RUN/checkpoints`; made when the first one is written.
        keep_last: newest checkpoints to keep, beside the best one.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, then drop the ones no longer kept. An interrupted write leaves the old ones as they were.

        Raises:
            UserError: when the disk is full; nothing half-written stays.
        """
        final = self.folder / checkpoint_name(int(checkpoint.state["step"]))
        partial = self.folder / f"{PARTIAL}{final.name}"
        with _disk_errors(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _save_tensors(checkpoint.weights, partial / "weights.safetensors")
            _save_tensors(checkpoint.ema, partial / "ema.safetensors")
            _save_tensors(checkpoint.optimizer, partial / "optimizer.safetensors")
            _write_synced(partial / STATE, json.dumps({"format": FORMAT, **checkpoint.state}, indent=1))
            if final.exists():  # the same step again, after a resume
                shutil.rmtree(final)
            partial.rename(final)
            _sync_folder(self.folder)
        self.rotate()
        return final

    def amend(self, step: int, changes: Mapping[str, Any]) -> None:
        """Change entries of a checkpoint's state, such as that it has been evaluated; the file is replaced at once."""
        folder = self.folder / checkpoint_name(step)
        with _disk_errors(None):
            write_json(folder / STATE, {**read_document(folder / STATE, "checkpoint"), **changes})

    def mark_best(self, name: str, facts: Mapping[str, Any]) -> None:
        """Point `best.json` at a checkpoint, with what made it the best."""
        with _disk_errors(None):
            write_json(self.folder / "best.json", {"checkpoint": name, **facts})

    def best(self) -> dict[str, Any] | None:
        """Content of `best.json`, or None."""
        file = self.folder / "best.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def go_back(self, step: int) -> bool:
        """Training goes on from this step: is the best checkpoint one that it comes from?

        One that was written after it stands no longer for the run, and is dropped in its turn.
        """
        best = self.best()
        if best is not None and str(best["checkpoint"]) <= checkpoint_name(step):
            return True
        (self.folder / "best.json").unlink(missing_ok=True)
        return False

    def complete(self) -> list[Path]:
        """Checkpoints that were written to the end, oldest first.

        Not by their step: a run that went back to its best checkpoint writes lower ones than those it left.
        """
        written = [path for path in self.folder.glob("step-*") if (path / STATE).is_file()]
        return sorted(written, key=lambda path: ((path / STATE).stat().st_mtime_ns, path.name))

    def rotate(self) -> None:
        """Drop all but the newest `keep_last` and the best one, and what an interrupted write left behind."""
        best = self.best()
        kept = {path.name for path in self.complete()[-self.keep_last :]} | ({best["checkpoint"]} if best else set())
        for path in self.complete():
            if path.name not in kept:
                shutil.rmtree(path)
        for path in self.folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        UserError: when it is incomplete, damaged or of another format.
    """
    state = read_document(folder / STATE, "checkpoint")
    try:
        tensors = [load_file(folder / f"{name}.safetensors") for name in ("weights", "ema", "optimizer")]
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {folder} is damaged ({error}): resume from another one") from None
    return Checkpoint(tensors[0], tensors[1], tensors[2], state)


def weights_file(folder: Path, shown: str) -> Path:
    """A checkpoint's weights, `live` or `ema`."""
    return folder / ("ema.safetensors" if shown == "ema" else "weights.safetensors")


def find_checkpoint(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint that `--resume` means; None starts from the base.

    `latest` and `best` look into the most recently written run below `output_dir`; `latest` without any checkpoint
    starts from the base, so that one command both starts and continues.

    Raises:
        UserError: for `best` without one, or a path that is no checkpoint.
    """
    if resume == "none":
        return None
    if resume not in ("latest", "best"):
        if not (Path(resume) / STATE).is_file():
            raise UserError(
                f"--resume {resume} is no checkpoint: give none, latest, best or a folder RUN/checkpoints/step-NUMBER"
            )
        read_document(Path(resume) / STATE, "checkpoint to resume from")
        return Path(resume)
    states = sorted(output_dir.glob("*/checkpoints/step-*/state.json"), key=lambda path: path.stat().st_mtime_ns)
    if not states:
        if resume == "latest":
            logger.warning("no checkpoint below %s: starting from the base", output_dir)
            return None
        raise UserError(f"--resume best: no checkpoint below --output_dir {output_dir}")
    folder = states[-1].parent.parent
    store = CheckpointStore(folder, keep_last=1)
    if resume == "latest":
        return store.complete()[-1]
    best = store.best()
    if best is None:
        raise UserError(f"--resume best: the run in {folder.parent} has not been evaluated yet; use latest")
    return folder / str(best["checkpoint"])


def optimizer_tensors(optimizer: torch.optim.Optimizer | BackwardOptimizer) -> Tensors:
    """The optimizer's state as named tensors; its hyper-parameters come from the configuration."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value).detach().cpu()
        for index, values in state.items()
        for key, value in _flat(values)
        if value is not None
    }


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """bitsandbytes puts its quantised state into a mapping of its own: KEY/INNER KEY."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}/{inner}", content) for inner, content in value.items())
        else:
            yield key, value


def load_optimizer(optimizer: torch.optim.Optimizer | BackwardOptimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put `optimizer_tensors` back into an optimizer made from the same configuration."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, path = name.split(".", 1)
        key, _, inner = path.partition("/")
        values = state.setdefault(int(index), {})
        if inner:
            values.setdefault(key, {})[inner] = value
        else:
            values[key] = int(value) if value.dtype == torch.int64 and value.ndim == 0 else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a small JSON file at once."""
    beside = path.with_name(f"{PARTIAL}{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_synced(beside, json.dumps(content, indent=1))
    beside.rename(path)


@contextmanager
def _disk_errors(partial: Path | None) -> Iterator[None]:
    """Turn a full disk into a message; take away what was half-written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if not full:
            raise
        raise UserError(
            "no space left for a checkpoint: free some, or set --output_dir elsewhere or a smaller "
            "--checkpoint.keep_last, then go on with --resume latest"
        ) from None


def _save_tensors(tensors: Tensors, path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
