"""What a program is at: never silent for long, quiet about what is short, whole lines, bars on a terminal alone."""

from __future__ import annotations

import io
import os
import threading
import time
from contextlib import suppress
from itertools import pairwise

import pytest

from dfu_mlflow.phases import INTERVAL_S, PATIENCE_S, TICK_S, Board, duration, phase, wrapped


class Stream(io.StringIO):
    """Remembers when it was written to."""

    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.terminal = terminal
        self.seconds = 1000.0
        self.times: list[float] = []

    def isatty(self) -> bool:
        return self.terminal and super().isatty() is not None  # a closed one raises

    def write(self, text: str) -> int:
        self.times.append(self.seconds)
        return super().write(text)


class Log:
    """A board with a clock that is turned by hand, and what it wrote."""

    def __init__(self, terminal: bool = False) -> None:
        self.stream = Stream(terminal)
        self.board = Board(lambda: self.seconds, self.stream, watched=False)

    @property
    def seconds(self) -> float:
        return self.stream.seconds

    def wait(self, seconds: float) -> None:
        end = self.seconds + seconds
        while self.seconds < end:
            self.stream.seconds += TICK_S
            self.board.tick()

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


@pytest.fixture
def log() -> Log:
    return Log()


def longest_silence(log: Log, start: float) -> float:
    edges = [start, *log.stream.times, log.seconds]
    return max(after - before for before, after in pairwise(edges))


def test_one_long_operation_is_never_silent_for_more_than_15_s(log: Log) -> None:
    start = log.seconds
    with log.board.phase("hashing the weights"):
        log.wait(100)
    assert longest_silence(log, start) <= 15
    assert log.lines[:2] == ["hashing the weights: 5 s", "hashing the weights: 19 s"]
    assert log.lines[-1] == "hashing the weights: 100 s"
    assert len(log.lines) <= 100 / INTERVAL_S + 2


def test_many_short_phases_in_a_row_are_not_silent_either(log: Log) -> None:
    start = log.seconds
    for _ in range(20):
        with log.board.phase("one of many"):
            log.wait(PATIENCE_S - 1)
    assert longest_silence(log, start) <= 15
    assert 4 <= len(log.lines) <= 12


def test_what_no_phase_has_a_name_for_is_not_silent_either(log: Log) -> None:
    start = log.seconds
    with log.board.phase("working", between=True):
        log.wait(20)
        with log.board.phase("hashing the weights"):
            log.wait(20)
        log.wait(20)
    assert longest_silence(log, start) <= 15
    assert log.lines == [
        "working: 14 s",
        "hashing the weights: 5 s",
        "hashing the weights: 19 s",
        "working: 53 s",
    ]


def test_a_phase_that_begins_after_a_silence_does_not_prolong_it(log: Log) -> None:
    start = log.seconds
    with log.board.phase("working", between=True):
        log.wait(INTERVAL_S - 1)
        with log.board.phase("hashing the weights"):
            log.wait(10)
    assert longest_silence(log, start) <= 15
    assert log.lines[0] == "hashing the weights: 1 s"


def test_work_between_phases_says_nothing_for_a_while(log: Log) -> None:
    with log.board.phase("working", between=True):
        for _ in range(5):
            log.wait(PATIENCE_S + 2)
            with log.board.phase("short"):
                log.wait(1)
            log.board.say("a line of the run")
    assert log.lines == []


def test_short_phases_say_nothing(log: Log) -> None:
    for _ in range(3):
        with log.board.phase("short", total=3, unit="pictures") as progress:
            log.wait(PATIENCE_S - 1)
            progress.advance(3)
        log.stream.seconds += 60  # nothing is open: this silence is no phase's
    assert log.lines == []


def test_a_line_says_what_how_far_and_how_long(log: Log) -> None:
    with log.board.phase("caching latents", total=1200, unit="pictures") as progress:
        progress.advance(300)
        progress.detail("512 px")
        log.wait(31)
        progress.advance(900)
    assert log.lines == [
        "caching latents: 300 of 1,200 pictures, 512 px, 5 s, 15 s left",
        "caching latents: 300 of 1,200 pictures, 512 px, 19 s, 57 s left",
        "caching latents: 1,200 of 1,200 pictures, 31 s",
    ]


def test_a_phase_of_half_a_minute_is_not_told_of_a_second_time(log: Log) -> None:
    with log.board.phase("caching latents"):
        log.wait(18)
    assert log.lines == ["caching latents: 5 s"]


def test_what_was_told_of_just_now_has_no_second_line(log: Log) -> None:
    with log.board.phase("caching latents"):
        log.wait(8)
    assert log.lines == ["caching latents: 5 s"]


def test_what_was_done_before_gives_no_pace(log: Log) -> None:
    with log.board.phase("training", total=100, unit="steps") as progress:
        progress.begin_at(50)
        log.wait(5)
        assert log.lines == ["training: 50 of 100 steps, 5 s"]
        progress.advance(10)
        assert progress.left_s(log.seconds) == pytest.approx(20)
        progress.expect(7)
        assert progress.left_s(log.seconds) == 7


def test_bytes_are_shown_in_gb(log: Log) -> None:
    with log.board.phase("hashing", total=5_100_000_000, unit="bytes") as progress:
        progress.advance(1_200_000_000)
        assert progress.count() == "1.20 of 5.10 GB"


def test_the_innermost_phase_speaks_and_names_the_outer_ones(log: Log) -> None:
    with log.board.phase("diagnosing", total=20, unit="checks") as outer:
        outer.advance(3)
        log.wait(1)
        with log.board.phase("sampling", total=48, unit="pictures") as inner:
            log.wait(3)
            inner.advance(16)
            log.wait(2)
    assert log.lines[0] == "diagnosing: 3 of 20 checks, 5 s, 28 s left"
    log.stream.truncate(0)
    with log.board.phase("diagnosing", total=20, unit="checks"), log.board.phase("sampling") as inner:
        log.wait(31)
    assert log.lines[0].lstrip("\0") == "diagnosing 0 of 20 checks > sampling: 5 s"
    assert log.lines[2:] == ["sampling: 31 s"]  # the outer one had no line of its own


def test_a_failing_block_closes_its_phase(log: Log) -> None:
    with suppress(RuntimeError), log.board.phase("packaging"):
        log.wait(12)
        raise RuntimeError
    assert log.lines == ["packaging: 5 s", "packaging: stopped after 12 s"]
    log.wait(60)
    assert len(log.lines) == 2


def test_lines_fit_a_log(log: Log) -> None:
    with log.board.phase("x" * 300):
        log.wait(6)
    assert max(map(len, log.lines)) <= 200
    assert "\r" not in log.stream.getvalue()
    text = wrapped("error: " + "word " * 100 + "/a/path" * 30)
    assert max(len(line) for line in text.splitlines() if "/a" not in line) <= 160
    assert "/a/path" * 30 in text


def test_only_the_main_rank_speaks(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with log.board.phase("training"):
        log.wait(60)
    assert log.lines == []


def test_threads_share_a_board(log: Log) -> None:
    with log.board.phase("sampling", total=4000, unit="pictures") as progress:

        def work() -> None:
            for _ in range(1000):
                with log.board.phase("a batch"):
                    progress.advance()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        log.wait(6)
    assert progress.done == 4000
    assert log.lines == ["sampling: 4,000 of 4,000 pictures, 5 s"]


def test_a_closed_stream_ends_no_run(log: Log) -> None:
    log.stream.close()
    with log.board.phase("training"):
        log.stream.seconds += 60
        log.board.tick()
    with log.board.phase("training"):
        log.stream.seconds += 60
        log.board.tick()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Log:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return Log(terminal=True)


def test_a_terminal_gets_bars_that_are_drawn_in_place(terminal: Log) -> None:
    with terminal.board.phase("training", total=10, unit="steps", keep=True) as progress:
        terminal.wait(2)
        with terminal.board.phase("sampling"):
            terminal.wait(3)
        progress.advance(10)
    drawn = terminal.stream.getvalue()
    assert "sampling" in drawn
    kept = drawn.rsplit("\x1b[2K", 1)[1]  # what stands after the last line was cleared
    assert kept.count("training") == 1
    assert "10 of 10 steps, 5 s" in kept
    assert "sampling" not in kept
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") == 1  # the cursor is hidden once, and shown again


def test_a_terminal_shows_no_bar_for_an_instant(terminal: Log) -> None:
    with terminal.board.phase("short"):
        terminal.wait(0.5)
    assert terminal.stream.getvalue() == ""


def test_the_thread_speaks_while_an_operation_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfu_mlflow.phases.TICK_S", 0.01)
    monkeypatch.setattr("dfu_mlflow.phases.PATIENCE_S", 0.02)
    stream = io.StringIO()
    board = Board(stream=stream)
    with board.phase("a solver step"):
        deadline = time.monotonic() + 10
        while not stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert stream.getvalue().startswith("a solver step: 0 s\n")
    assert sum(thread.name == "phases" for thread in threading.enumerate()) >= 1


def test_thousands_of_phases_start_one_thread() -> None:
    board = Board(stream=io.StringIO())
    before = threading.active_count()
    began = time.perf_counter()
    for _ in range(1000):
        with board.phase("instant"):
            pass
    assert time.perf_counter() - began < 1
    assert threading.active_count() <= before + 1


def test_a_forked_child_keeps_quiet_and_does_not_hang() -> None:
    with phase("outside") as progress:
        child = os.fork()
        if child == 0:
            progress.advance()
            with phase("inside"):
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (75, "75 s"), (125, "2 min 5 s"), (720, "12 min"), (12600, "3.5 h")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
