"""What a program is at, how far, and how long it will take: bars on a terminal, now and then a line in a log.

    with phase("caching latents", total=1200, unit="pictures") as progress:
        progress.advance(16)

One thread of the process speaks while a phase is open, so that a single long operation is not silent either. Phases
that are over within seconds say nothing and cost microseconds.
"""

from __future__ import annotations

import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from dfu_mlflow.phase_bars import Bars

PATIENCE_S = 5.0
"""A phase that is over by then says nothing in a log."""
FINAL_S = 30.0
"""A phase that is well over by then is not told of a second time."""
INTERVAL_S = 14.0
"""Between lines: nobody waits for more than 15 s, the thread's own second included."""
TICK_S = 0.5
PAUSE_S = 2.0
"""Without any phase: what is quiet for longer is no work that goes on."""
MAX_CHARACTERS = 200
WRAP_CHARACTERS = 160


class Progress:
    """How far a phase has come.

    Attributes:
        name: what is done, e.g. `caching latents`.
        total: how much there is to do, None where that is not known.
        unit: of `total`, in the plural; `bytes` are shown in GB.
        done: so much of it.
        keep: a terminal goes on showing the bar when the phase is over.
        between: it is told of only while no other phase is open.
    """

    def __init__(
        self, board: Board, name: str, total: float | None, unit: str, keep: bool = False, between: bool = False
    ) -> None:
        self._board = board
        self.name, self.total, self.unit, self.keep, self.between = name, total, unit, keep, between
        self.done = 0.0
        self.said = self.named = False  # by a line of its own; by one of its own or of an inner phase
        self.began_s = board.now()
        self.thread = threading.get_ident()
        self._first = 0.0
        self._words = ""
        self._left_s: float | None = None

    def advance(self, count: float = 1) -> None:
        """So much more is done; any thread may say so."""
        with self._board.lock:
            self.done += count

    def reach(self, count: float) -> None:
        """So much is done in all."""
        self.done = count

    def begin_at(self, count: float) -> None:
        """So much was done before the phase began, e.g. by a run that is resumed."""
        self.done = self._first = count

    def detail(self, words: str) -> None:
        """A few words to be shown beside the figures; they replace earlier ones."""
        self._words = words

    def expect(self, seconds: float) -> None:
        """The time left, where the caller knows it better than the pace so far tells."""
        self._left_s = seconds

    def left_s(self, now_s: float) -> float | None:
        """Seconds until the end at the pace so far, None where nothing tells."""
        if self._left_s is not None:
            return self._left_s
        made = self.done - self._first
        if self.total is None or made <= 0:
            return None
        return max(0.0, (now_s - self.began_s) * (self.total - self.done) / made)

    def count(self) -> str:
        """`320 of 1,200 pictures`; empty where nothing is counted."""
        if self.unit == "bytes":
            whole = "" if self.total is None else f" of {self.total / 1e9:.2f}"
            return f"{self.done / 1e9:.2f}{whole} GB" if self.done or self.total else ""
        if self.total is not None:
            return f"{int(min(self.done, self.total) + 1e-6):,} of {self.total:,.0f} {self.unit}".rstrip()
        return f"{int(self.done + 1e-6):,} {self.unit}".rstrip() if self.done else ""

    def state(self, now_s: float) -> str:
        """Count, words, seconds, time left."""
        parts = [self.count(), self._words, duration(now_s - self.began_s)]
        left_s = self.left_s(now_s)
        complete = self.total is not None and self.done >= self.total
        parts += [f"{duration(left_s)} left"] if left_s is not None and not complete else []
        return ", ".join(part for part in parts if part)


class Board:
    """The open phases of a process, and what is said of them.

    Args:
        clock: seconds.
        stream: where lines and bars go; None is `sys.stderr` as it is at that moment.
        watched: whether a thread calls `tick`; tests do it themselves.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, stream: TextIO | None = None, watched: bool = True
    ) -> None:
        self.now = clock
        self.lock = threading.RLock()
        self._stream = stream
        self._watched = watched
        self._watcher: threading.Thread | None = None
        self._awake = threading.Event()
        self._open: list[Progress] = []
        self._bars: Bars | None = None
        self._busy_since_s = self._idle_since_s = self._spoke_s = float("-inf")
        self._closed = self._plain = False

    @contextmanager
    def phase(
        self, name: str, total: float | None = None, unit: str = "", keep: bool = False, between: bool = False
    ) -> Iterator[Progress]:
        """See `phase` and `at_work`."""
        progress = Progress(self, name, total, unit, keep, between)
        self._enter(progress)
        try:
            yield progress
        except BaseException:
            self._leave(progress, "stopped after ")
            raise
        self._leave(progress, "")

    def say(self, text: str) -> None:
        """Print a line, above the bars; in a log a long one is wrapped."""
        with self.lock:
            self._spoke_s = self.now()
            print(text if sys.stdout.isatty() else wrapped(text), flush=True)

    def tick(self) -> None:
        """Say what is due now."""
        with self.lock:
            if not self._open:
                self._awake.clear()
            else:
                self._guarded(self._show)

    def forked(self) -> None:
        """A child process has neither the thread nor the terminal: its parent speaks."""
        self.lock = threading.RLock()
        self._open = []
        self._bars = None
        self._closed = True

    def _enter(self, progress: Progress) -> None:
        with self.lock:
            if self._closed or os.environ.get("RANK", "0") not in ("", "0"):
                return
            if not self._open and progress.began_s - self._idle_since_s > PAUSE_S:
                self._busy_since_s = progress.began_s
            self._open.append(progress)
            if self._watched and self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="phases", daemon=True)
                self._watcher.start()
            if not self._awake.is_set():
                self._awake.set()

    def _leave(self, progress: Progress, how: str) -> None:
        with self.lock:
            if progress not in self._open:
                return
            self._open.remove(progress)
            self._idle_since_s = self.now()
            if self._bars is not None:
                self._guarded(lambda: self._undraw(progress))
            elif progress.said and not progress.between and (how or self._idle_since_s - progress.began_s >= FINAL_S):
                self._guarded(lambda: self._write(self._last_line(progress, how)))

    def _watch(self) -> None:
        while True:
            self._awake.wait()
            time.sleep(TICK_S)
            self.tick()

    def _guarded(self, work: Callable[[], None]) -> None:
        """A stream that is closed or has no reader any more ends no run."""
        try:
            work()
        except (OSError, ValueError):
            self._closed, self._open = True, []

    def _show(self) -> None:
        if self._bars is None and self._on_terminal():
            try:
                from dfu_mlflow.phase_bars import Bars

                self._bars = Bars(self._stream or sys.stderr)
            except ImportError:  # a packaged sampler brings what drawing needs, and no bars
                self._plain = True
        if self._bars is None:
            self._speak_if_due()
        else:
            self._bars.draw(self._told(), self.now())

    def _speak_if_due(self) -> None:
        now_s = self.now()
        opened = self._told() or self._open
        newest = opened[-1]
        quiet_s = now_s - max(self._spoke_s, self._busy_since_s)
        news = [one for one in opened if now_s - one.began_s >= PATIENCE_S and not one.between]
        if quiet_s < INTERVAL_S:
            if not news or news[-1].named:
                return
            newest = news[-1]
        outer = [one for one in opened if one.thread == newest.thread and one is not newest]
        outer = [one for one in outer if opened.index(one) < opened.index(newest)]
        for one in (*outer, newest):
            one.named = True
        newest.said = True
        names = [" ".join(filter(None, (one.name, one.count()))) for one in outer]
        self._write(f"{' > '.join([*names, newest.name])}: {newest.state(now_s)}")

    def _told(self) -> list[Progress]:
        """The open phases but those that fill the time between others."""
        return [one for one in self._open if not one.between]

    def _last_line(self, progress: Progress, how: str) -> str:
        count = f"{progress.count()}, " if progress.count() else ""
        return f"{progress.name}: {how}{count}{duration(self.now() - progress.began_s)}"

    def _write(self, line: str) -> None:
        self._spoke_s = self.now()
        if self._stream is None:
            sys.stdout.flush()  # what was printed before comes before
        stream = self._stream or sys.stderr
        stream.write(f"{_short(line)}\n")
        stream.flush()

    def _on_terminal(self) -> bool:
        able = not self._plain and os.environ.get("TERM", "dumb") not in ("", "dumb")
        return able and (self._stream or sys.stderr).isatty()

    def _undraw(self, progress: Progress) -> None:
        assert self._bars is not None
        self._bars.remove(progress, self.now())
        if not self._told():
            self._bars.close()
            self._bars = None


@cache
def board() -> Board:
    """The one of this process."""
    one = Board()
    os.register_at_fork(after_in_child=one.forked)
    return one


def phase(
    name: str, total: float | None = None, unit: str = "", keep: bool = False
) -> AbstractContextManager[Progress]:
    """Show what goes on inside the block, if it takes more than a few seconds; only rank 0 does.

    Args:
        name: what is done, in small letters, e.g. `caching latents`.
        total: how much there is to do, None where that is not known.
        unit: of `total`, in the plural; `bytes` are shown in GB.
        keep: a terminal goes on showing the bar when the phase is over.

    Phases may be nested, and open in several threads at once.
    """
    return board().phase(name, total, unit, keep)


def at_work() -> AbstractContextManager[Progress]:
    """Around everything that a command does: what no phase has a name for is not silent for long either."""
    return board().phase("working", between=True)


def say(text: str) -> None:
    """Print a line of the run above the bars; in a log a long one is wrapped."""
    board().say(text)


def duration(seconds: float) -> str:
    """For a person: `75 s`, `2 min 5 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s".removesuffix(" 0 s")
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def wrapped(text: str) -> str:
    """Lines of at most 160 characters; a path or another long word is not broken."""
    return "\n".join(
        "\n".join(
            textwrap.wrap(line, WRAP_CHARACTERS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
            or [""]
        )
        for line in text.split("\n")
    )


def _short(line: str) -> str:
    """On one line that fits a log."""
    line = " ".join(line.split())
    return line if len(line) <= MAX_CHARACTERS else f"{line[: MAX_CHARACTERS // 2 - 3]} ... {line[-95:]}"
