"""Where ranks leave word for each other: who is alive, how far each has come, and why one has left.

It is a key-value store beside the collectives, which say at best that *somebody* is missing. Under torchelastic the
store lives in the launcher, so it outlives every rank.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dfu_mlflow.entry import USER_ERROR_CODE
from dfu_mlflow.errors import Interrupted

BEAT_S = 0.5
SILENT_S = 4.0
"""A rank without a beat for eight beats is taken for dead, but only once something else has gone wrong."""

GRACE_S = 5.0
"""What a rank has to end by itself once another one has failed."""


@dataclass(frozen=True)
class Beat:
    """Sign of life of a rank.

    Attributes:
        number: grows while the process lives.
        order: how many places it has come to.
        place: the last one.
    """

    number: int
    order: int
    place: str


class Board:
    """Word that ranks leave for each other.

    Args:
        store: a `torch.distributed.Store`.
        index: this rank.
        count: how many there are.
    """

    def __init__(self, store: Any, index: int, count: int) -> None:
        self.index = index
        self.count = count
        self.order = 0
        self.place = "the start"
        self._since_s = time.monotonic()
        self._store = store
        self._beats = 0
        self._stopped = threading.Event()
        self._beat(store)
        # A connection of its own: an operation that blocks holds its connection's lock.
        self._thread = threading.Thread(target=self._keep_beating, args=(store.clone(),), daemon=True)
        self._thread.start()

    def at(self, place: str) -> None:
        """This rank has come to a place; all ranks come to the same places in the same order."""
        self.order += 1
        self.place = place
        self._since_s = time.monotonic()

    def seconds_here(self) -> float:
        """Since this rank came to its place."""
        return time.monotonic() - self._since_s

    def arrive(self, place: str) -> None:
        """Come to a place where the others are waited for."""
        self.at(place)
        self._store.set(f"arrived/{self.order}/{self.index}", "")

    def missing(self, ranks: Sequence[int]) -> list[int]:
        """Those that have not arrived where this rank is."""
        return [rank for rank in ranks if not self._store.check([f"arrived/{self.order}/{rank}"])]

    def leave(self, kind: str, message: str) -> None:
        """Say why this rank ends; the first word counts."""
        with suppress(RuntimeError):  # without a launcher the store dies with rank 0, which has told by then
            self._store.set(f"left/{self.index}", json.dumps({"kind": kind, "message": message}))
            if kind != Interrupted.__name__:  # others who are interrupted may still be writing a checkpoint
                self._store.set("failed", "")

    def left(self) -> tuple[int, dict[str, str]] | None:
        """A rank that has said why it ends, with `kind` and `message`."""
        for rank in range(self.count):
            if rank != self.index and self._store.check([f"left/{rank}"]):
                return rank, json.loads(self._store.get(f"left/{rank}"))
        return None

    def beat_of(self, rank: int) -> Beat:
        """The last sign of life of a rank."""
        if not self._store.check([f"beat/{rank}"]):
            return Beat(0, 0, "the start")
        number, order, place = bytes(self._store.get(f"beat/{rank}")).decode().split("|", 2)
        return Beat(int(number), int(order), place)

    def silent(self) -> list[int]:
        """Ranks whose process is gone; looks for a few seconds."""
        before = {rank: self.beat_of(rank).number for rank in range(self.count) if rank != self.index}
        deadline = time.monotonic() + SILENT_S
        while before and time.monotonic() < deadline:
            time.sleep(BEAT_S)
            before = {rank: number for rank, number in before.items() if self.beat_of(rank).number == number}
        return sorted(rank for rank in before if not self._store.check([f"left/{rank}"]))

    def behind(self) -> list[int]:
        """Ranks that have not come to where this one is."""
        return [rank for rank in range(self.count) if self.beat_of(rank).order < self.order and rank != self.index]

    def close(self) -> None:
        """No more signs of life."""
        self._stopped.set()
        self._thread.join()

    def _keep_beating(self, store: Any) -> None:
        left_s = GRACE_S
        while not self._stopped.wait(BEAT_S):
            try:
                self._beat(store)
                failed = self.index > 0 and store.check(["failed"])
            except RuntimeError:  # the launcher is gone, and with it everybody who could read this
                return
            if failed:
                left_s -= BEAT_S
            if left_s < 0:  # it hangs; a launcher would wait for it. The main rank has a run to close
                os._exit(USER_ERROR_CODE)

    def _beat(self, store: Any) -> None:
        self._beats += 1
        store.set(f"beat/{self.index}", f"{self._beats}|{self.order}|{self.place}")
