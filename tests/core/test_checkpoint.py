"""Checkpoints are whole or not there."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dfu_mlflow.checkpoint import Checkpoint, CheckpointStore, find_checkpoint, load_checkpoint
from dfu_mlflow.errors import UserError


def checkpoint(step: int, size: int = 4) -> Checkpoint:
    return Checkpoint({"w": torch.full((size,), float(step))}, {}, {"0.step": torch.tensor(1.0)}, {"step": step})


def test_round_trip(tmp_path: Path) -> None:
    folder = CheckpointStore(tmp_path, keep_last=2).save(checkpoint(3))
    loaded = load_checkpoint(folder)
    assert torch.equal(loaded.weights["w"], torch.full((4,), 3.0))
    assert loaded.ema == {}
    assert loaded.state["step"] == 3
    assert not list(folder.glob("*.p*t*h")), "safetensors and JSON only"


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    store.save(checkpoint(1))
    store.mark_best("step-00000001", {"epoch": 1})
    for step in (2, 3, 4):
        store.save(checkpoint(step))
    assert [path.name for path in store.complete()] == ["step-00000001", "step-00000003", "step-00000004"]


def test_a_run_that_went_back_keeps_what_it_writes_then(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=2)
    for step in (1, 2, 3):
        store.save(checkpoint(step))
        if step == 1:
            store.mark_best("step-00000001", {"epoch": 1})
    assert store.go_back(1)
    store.save(checkpoint(2))
    assert find_checkpoint("latest", tmp_path) == store.folder / "step-00000002"
    assert [path.name for path in store.complete()] == ["step-00000001", "step-00000003", "step-00000002"]
    store.mark_best("step-00000002", {"epoch": 2})
    assert not store.go_back(1)
    assert store.best() is None, "it was written after the step that the run went back to"


def test_an_interrupted_write_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run" / "checkpoints"
    store = CheckpointStore(run, keep_last=2)
    store.save(checkpoint(1))
    half = run / ".partial-step-00000002"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    assert find_checkpoint("latest", tmp_path) == run / "step-00000001"
    store.save(checkpoint(3))
    assert not half.exists()


def test_what_resume_means(tmp_path: Path) -> None:
    assert find_checkpoint("none", tmp_path) is None
    assert find_checkpoint("latest", tmp_path) is None
    with pytest.raises(UserError, match="no checkpoint below --output_dir"):
        find_checkpoint("best", tmp_path)
    with pytest.raises(UserError, match="is no checkpoint"):
        find_checkpoint(str(tmp_path), tmp_path)
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=5)
    for step in (1, 2):
        store.save(checkpoint(step))
    with pytest.raises(UserError, match="not been evaluated"):
        find_checkpoint("best", tmp_path)
    store.mark_best("step-00000001", {})
    assert find_checkpoint("best", tmp_path) == store.folder / "step-00000001"
    assert find_checkpoint("latest", tmp_path) == store.folder / "step-00000002"
    assert find_checkpoint(str(store.folder / "step-00000001"), tmp_path) == store.folder / "step-00000001"


def test_damage_and_other_formats_are_named(tmp_path: Path) -> None:
    folder = CheckpointStore(tmp_path, keep_last=1).save(checkpoint(1))
    (folder / "weights.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(folder)
    (folder / "state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_named_and_leaves_the_old_checkpoints(small_disk: Path) -> None:
    store = CheckpointStore(small_disk / "run" / "checkpoints", keep_last=5)
    store.save(checkpoint(1))
    with pytest.raises(UserError, match="no space left"):
        store.save(checkpoint(2, size=2**20))
    assert [path.name for path in store.complete()] == ["step-00000001"]
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
    assert load_checkpoint(store.complete()[0]).state["step"] == 1
