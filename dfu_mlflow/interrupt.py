"""Ctrl-C and SIGTERM as a request that the loop answers at a safe point."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self

from dfu_mlflow.errors import Interrupted


class StopRequest:
    """Remembers the first SIGINT or SIGTERM inside a `with` block; a second one acts as usual."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def requested(self) -> bool:
        """Has somebody asked to stop?"""
        return self.signal_name is not None

    def check(self) -> None:
        """Raise where stopping is safe.

        Raises:
            Interrupted: when a signal has come.
        """
        if self.signal_name is not None:
            raise Interrupted(f"stopped by {self.signal_name}")

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
