"""Bars of the open phases on a terminal, the inner ones below."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

SHOWN_AFTER_S = 1.0
"""A bar that is gone at once is no news."""


class Shown(Protocol):
    """What a bar shows: a phase."""

    name: str
    total: float | None
    done: float
    keep: bool
    began_s: float

    def state(self, now_s: float) -> str:
        """In words."""


class Bars:
    """One bar a phase; lines that are printed meanwhile appear above them.

    Args:
        stream: the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            console=Console(file=stream),
            auto_refresh=False,  # the board's thread does it
            redirect_stdout=sys.stdout.isatty(),
        )
        self._tasks: dict[Shown, TaskID] = {}
        self._started = False

    def draw(self, opened: Sequence[Shown], now_s: float) -> None:
        """Show the phases as they are now."""
        for one in opened:
            if one not in self._tasks and (one.keep or now_s - one.began_s >= SHOWN_AFTER_S):
                self._tasks[one] = self._bars.add_task(one.name, total=one.total, state="")
        if self._tasks and not self._started:
            self._bars.start()
            self._started = True
        for one in self._tasks:
            self._update(one, now_s)
        if self._started:
            self._bars.refresh()

    def remove(self, one: Shown, now_s: float) -> None:
        """A phase is over."""
        if one not in self._tasks:
            return
        if one.keep:
            self._update(one, now_s)
            del self._tasks[one]
        else:
            self._bars.remove_task(self._tasks.pop(one))
        self._bars.refresh()

    def close(self) -> None:
        """Leave the terminal with the bars that are to be kept."""
        if self._started:
            self._bars.stop()

    def _update(self, one: Shown, now_s: float) -> None:
        self._bars.update(self._tasks[one], total=one.total, completed=one.done, state=one.state(now_s))
