"""Rows that are costly to compute, kept on disk under keys that name everything they depend on."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dfu_mlflow.config.schema import DataConfig
from dfu_mlflow.data.packs import SUFFIX, make_private_folder, read_index, read_rows, write_pack
from dfu_mlflow.lean_imports import user_cache
from dfu_mlflow.phases import Progress, phase

Compute = Callable[[list[int]], torch.Tensor]


class Work(NamedTuple):
    """What computing rows is called while it goes on, and what a row is of."""

    name: str
    unit: str = "pictures"


CACHING = Work("caching rows", "rows")
PACK_BYTES = 64 * 2**20
PACK_SECONDS = 60.0
"""A pack is closed at this size or age, whichever comes first: a killed process loses at most that much work."""
ABANDONED_SECONDS = 24 * 3600.0


def default_cache_dir(config: DataConfig) -> Path:
    """`data.cache_dir`, or `$XDG_CACHE_HOME/dfu-mlflow`, or `~/.cache/dfu-mlflow`."""
    if config.cache_dir is not None:
        return config.cache_dir.expanduser()
    return user_cache()


class RowCache:
    """Tensors [N, ...] whose rows are looked up by key and computed where they are missing.

    Keys must name everything a row depends on: nothing is ever invalidated. Processes may share a folder; each writes
    packs of its own and never touches those of others, so the worst that can happen is a row stored twice. Damaged
    rows count as missing. One instance is not meant for several threads.

    Attributes:
        hits, misses: distinct rows found and computed since this instance was made.
        last_hits, last_misses: the same for the latest call of `rows`.
    """

    def __init__(self, folder: Path, batch_size: int = 32) -> None:
        """Keep rows below `folder`, which is made (0700) when it is missing; `batch_size` is that of `rows`."""
        self.folder = folder
        self.batch_size = batch_size
        self.hits = self.misses = self.last_hits = self.last_misses = 0
        self._packs: dict[Path, list[str] | None] = {}
        make_private_folder(folder)

    def rows(
        self,
        namespace: str,
        keys: Sequence[str],
        compute: Compute,
        batch_size: int | None = None,
        work: Work = CACHING,
    ) -> torch.Tensor:
        """Look rows up, computing those that are missing.

        Args:
            namespace: what kind of rows, including the identity of the model that makes them.
            keys: one a row; repeated keys are computed once.
            compute: takes positions in `keys` and returns their rows, [n, ...].
            batch_size: positions handed to `compute` at once; None takes the instance's.
            work: what computing them is called.

        Returns:
            [N, ...] on the CPU, in the order of the keys; an empty tensor [0] for no keys.

        Raises:
            UserError: where the cache's folder cannot be written.
            ValueError: where `compute` returns another number of rows than it was asked for, or of unequal shapes.
        """
        if not keys:
            self.last_hits = self.last_misses = 0
            return torch.empty(0)
        return self.stored(namespace, keys, compute, batch_size, work)[:]

    def stored(
        self,
        namespace: str,
        keys: Sequence[str],
        compute: Compute,
        batch_size: int | None = None,
        work: Work = CACHING,
    ) -> StoredRows:
        """As `rows`, for at least one key, but the rows stay in their files until they are asked for."""
        folder = self._open(namespace)
        table = _Table(keys)
        self._read(folder, table)
        missing = table.missing()
        self._count(len(table.positions) - len(missing), len(missing))
        if missing:
            with phase(work.name, len(missing), work.unit) as progress:
                self._fill(folder, table, missing, (compute, batch_size or self.batch_size, progress))
        return StoredRows(table.rows())

    def _count(self, hits: int, misses: int) -> None:
        self.last_hits, self.last_misses = hits, misses
        self.hits += hits
        self.misses += misses

    def _open(self, namespace: str) -> Path:
        readable = re.sub(r"[^A-Za-z0-9]+", "_", namespace)[:40]
        folder = self.folder / f"{readable}-{hashlib.sha256(namespace.encode()).hexdigest()[:16]}"
        make_private_folder(folder)
        for path in folder.glob(".*"):  # what a killed process was writing; a younger one may still be at it
            if _age_s(path) > ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
        return folder

    def _read(self, folder: Path, table: _Table) -> None:
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            if path not in self._packs:
                self._packs[path] = read_index(path)
            index = self._packs[path] or []
            here = {key: at for at, key in enumerate(index) if table.lacks(key)}
            for key, row in read_rows(path, here) if here else ():
                table.put(key, row)

    @staticmethod
    def _fill(folder: Path, table: _Table, missing: list[int], work: tuple[Compute, int, Progress]) -> None:
        """Compute rows in batches and store them pack by pack, also when `compute` or the user breaks off."""
        compute, batch_size, progress = work
        unsaved: list[torch.Tensor] = []
        saved, opened = 0, time.monotonic()

        def store() -> None:
            nonlocal unsaved, saved, opened
            rows = torch.cat(unsaved)
            unsaved = []
            new = [table.keys[position] for position in missing[saved : saved + len(rows)]]
            path = write_pack(folder, new, rows)
            for key, row in read_rows(path, {key: at for at, key in enumerate(new)}):
                table.put(key, row)
            saved, opened = saved + len(rows), time.monotonic()

        try:
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                rows = compute(batch).detach().cpu()
                if len(rows) != len(batch):
                    raise ValueError(f"asked for {len(batch)} rows, computed {len(rows)}")
                table.require_shape(rows.shape[1:])
                unsaved.append(rows)
                progress.advance(len(rows))
                if sum(part.nbytes for part in unsaved) >= PACK_BYTES or time.monotonic() - opened > PACK_SECONDS:
                    store()
        finally:
            if unsaved:
                store()


class StoredRows:
    """Rows [N, ...] that lie in memory-mapped files; those asked for are copied out.

    The system drops what was not used for a while, so that a data set may be larger than the memory.
    """

    def __init__(self, rows: Sequence[torch.Tensor]) -> None:
        self._rows = rows

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...)."""
        return (len(self._rows), *self._rows[0].shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, wanted: torch.Tensor | slice) -> torch.Tensor:
        """The rows at these positions (int64 [n], or a slice), copied: [n, ...]."""
        if isinstance(wanted, slice):
            return torch.stack(self._rows[wanted])  # type: ignore[arg-type]
        return torch.stack([self._rows[position] for position in wanted.tolist()])


class _Table:
    """The answer of `RowCache.stored` while it is put together: no row is held twice."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = keys
        self.positions: dict[str, list[int]] = {}
        for position, key in enumerate(keys):
            self.positions.setdefault(key, []).append(position)
        self._absent = set(self.positions)
        self._rows: dict[str, torch.Tensor] = {}
        self._shape: torch.Size | None = None

    def lacks(self, key: str) -> bool:
        return key in self._absent

    def missing(self) -> list[int]:
        """First position of each distinct key without a row, increasing."""
        return [positions[0] for key, positions in self.positions.items() if key in self._absent]

    def put(self, key: str, row: torch.Tensor) -> None:
        self.require_shape(row.shape)
        self._rows[key] = row
        self._absent.discard(key)

    def require_shape(self, shape: torch.Size) -> None:
        self._shape = self._shape or shape
        if shape != self._shape:
            raise ValueError(f"rows of one call differ in shape: {tuple(shape)}, {tuple(self._shape)}")

    def rows(self) -> list[torch.Tensor]:
        if self._absent:
            raise RuntimeError(f"{len(self._absent)} rows were never filled in")
        return [self._rows[key] for key in self.keys]


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
