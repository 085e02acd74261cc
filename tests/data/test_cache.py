"""The row cache: private, shared, and suspicious of what it finds on disk."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import stat
import time
from pathlib import Path

import pytest
import torch

from dfu_mlflow.config.schema import DataConfig
from dfu_mlflow.data import RowCache, default_cache_dir
from dfu_mlflow.errors import UserError


class Squares:
    """Row of key `k7` is 7² in [2, 3]; counts what it was asked for."""

    def __init__(self, keys: list[str]) -> None:
        self.keys = keys
        self.asked: list[list[int]] = []

    def __call__(self, positions: list[int]) -> torch.Tensor:
        self.asked.append(positions)
        return torch.stack([torch.full((2, 3), float(self.keys[position][1:]) ** 2) for position in positions])


def expected(keys: list[str]) -> torch.Tensor:
    return torch.stack([torch.full((2, 3), float(key[1:]) ** 2) for key in keys])


def fill(folder: Path, keys: list[str]) -> Squares:
    squares = Squares(keys)
    torch.testing.assert_close(RowCache(folder).rows("squares", keys, squares), expected(keys), rtol=0, atol=0)
    return squares


def test_rows_come_in_key_order_and_are_computed_once(tmp_path: Path) -> None:
    cache = RowCache(tmp_path / "cache", batch_size=2)
    keys = ["k3", "k1", "k3", "k2"]
    first = Squares(keys)
    torch.testing.assert_close(cache.rows("squares", keys, first), expected(keys))
    assert first.asked == [[0, 1], [3]]
    assert (cache.last_hits, cache.last_misses) == (0, 3)
    keys = ["k2", "k9", "k1"]
    second = Squares(keys)
    torch.testing.assert_close(cache.rows("squares", keys, second), expected(keys))
    assert second.asked == [[1]]
    assert (cache.last_hits, cache.last_misses) == (2, 1)
    assert (cache.hits, cache.misses) == (2, 4)


def test_namespaces_do_not_meet(tmp_path: Path) -> None:
    cache = RowCache(tmp_path)
    cache.rows("vae:a/b", ["k1"], Squares(["k1"]))
    cache.rows("vae:a_b", ["k1"], Squares(["k1"]))
    assert cache.misses == 2
    assert cache.rows("vae:a_b", [], Squares([])).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_dtype_and_bits_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    keys = ["a", "b", "c"]
    RowCache(tmp_path).rows("x", keys, lambda positions: rows[positions])
    again = RowCache(tmp_path).rows("x", keys, lambda positions: pytest.fail("not cached"))
    assert again.dtype == dtype
    assert torch.equal(again, rows)


def test_everything_is_private_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        fill(tmp_path / "deep" / "cache", ["k1", "k2"])
    finally:
        os.umask(before)
    made = [tmp_path / "deep" / "cache", *(tmp_path / "deep" / "cache").rglob("*")]
    assert len(made) == 3
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "header"])
def test_damaged_packs_are_recomputed(tmp_path: Path, damage: str) -> None:
    keys = [f"k{number}" for number in range(8)]
    fill(tmp_path, keys)
    pack = next(tmp_path.rglob("*.safetensors"))
    content = bytearray(pack.read_bytes())
    if damage == "truncated":
        content = content[: len(content) * 2 // 3]
    elif damage == "emptied":
        content = bytearray()
    elif damage == "flipped":
        content[-5] ^= 0x10  # inside the last row
    else:
        content[12] ^= 0x40
    pack.write_bytes(content)
    assert list(itertools.chain(*fill(tmp_path, keys).asked)) == ([7] if damage == "flipped" else list(range(8)))
    assert fill(tmp_path, keys).asked == []


def test_foreign_and_abandoned_files_do_no_harm(tmp_path: Path) -> None:
    fill(tmp_path, ["k1"])
    folder = next(tmp_path.rglob("*.safetensors")).parent
    (folder / "junk.safetensors").write_text("hello")
    young, old = folder / ".young", folder / ".old"
    young.touch()
    old.touch()
    os.utime(old, (time.time() - 1e6,) * 2)
    assert fill(tmp_path, ["k1"]).asked == []
    assert young.exists()
    assert not old.exists()


def test_work_done_before_a_failure_is_kept(tmp_path: Path) -> None:
    keys = ["k1", "k2", "k3"]
    squares = Squares(keys)

    def breaking(positions: list[int]) -> torch.Tensor:
        if positions == [2]:
            raise KeyboardInterrupt
        return squares(positions)

    with pytest.raises(KeyboardInterrupt):
        RowCache(tmp_path, batch_size=1).rows("squares", keys, breaking)
    assert fill(tmp_path, keys).asked == [[2]]


def test_full_disk_names_the_flag_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left.*--data\.cache_dir"):
        fill(tmp_path, ["k1"])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_folder_that_cannot_be_made_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--data\.cache_dir"):
        RowCache(tmp_path / "file" / "cache")


def test_wrong_number_or_shape_of_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="asked for 2 rows, computed 1"):
        RowCache(tmp_path).rows("x", ["a", "b"], lambda positions: torch.zeros(1, 2))
    with pytest.raises(ValueError, match="differ in shape"):
        RowCache(tmp_path, 1).rows("x", ["a", "b"], lambda positions: torch.zeros(1, 2 + positions[0]))


def test_ten_thousand_rows_open_in_less_than_a_second(tmp_path: Path) -> None:
    keys = [f"{number:064x}" for number in range(10_000)]
    rows = torch.arange(2048, dtype=torch.float32).reshape(8, 16, 16)
    RowCache(tmp_path, 64).rows("latents", keys, lambda positions: torch.stack([rows + at for at in positions]))
    seconds = []
    for _ in range(3):  # this thread's own, at its best: other tests' threads and processes are not the cache's
        started = time.thread_time()
        found = RowCache(tmp_path).rows("latents", keys, lambda positions: pytest.fail("not cached"))
        seconds.append(time.thread_time() - started)
        assert torch.equal(found[9_999], rows + 9_999)
    assert min(seconds) < 1.0, seconds


def test_two_processes_write_one_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    halves = [[f"k{number}" for number in range(start, start + 60)] for start in (0, 30)]
    workers = [context.Process(target=_fill_slowly, args=(tmp_path, keys)) for keys in halves]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert fill(tmp_path, [f"k{number}" for number in range(90)]).asked == []


def _fill_slowly(folder: Path, keys: list[str]) -> None:
    for start in range(0, len(keys), 10):
        part = keys[start : start + 10]
        rows = RowCache(folder, batch_size=3).rows("squares", part, Squares(part))
        assert torch.equal(rows, expected(part))


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir(DataConfig()) == tmp_path / "dfu-mlflow"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir(DataConfig()) == Path.home() / ".cache" / "dfu-mlflow"
    assert default_cache_dir(DataConfig(cache_dir=Path("~/x"))) == Path.home() / "x"


def test_stored_rows_are_read_from_their_files_when_indexed(tmp_path: Path) -> None:
    values = torch.randn(50, 3, 2)
    keys = [str(number) for number in range(50)]
    cold = RowCache(tmp_path).stored("x", keys, lambda positions: values[positions], batch_size=7)
    warm = RowCache(tmp_path).stored("x", [*keys[::-1], "3"], lambda positions: values[:0])
    assert cold.shape == (50, 3, 2)
    assert warm.shape == (51, 3, 2)
    assert len(warm) == 51
    assert torch.equal(cold[:], values)
    assert torch.equal(cold[10:20:2], values[10:20:2])
    assert torch.equal(warm[torch.tensor([0, 49, 50, 0])], values[[49, 0, 3, 49]])
    copy = warm[torch.tensor([0])]
    copy += 1.0
    assert torch.equal(warm[torch.tensor([0])], values[49:]), "what was handed out is not the file's"
