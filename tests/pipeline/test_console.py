"""What a training shows: its place, its pace without the evaluations, and an end."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from dfu_mlflow.data.cache import RowCache, Work
from dfu_mlflow.phases import Board
from dfu_mlflow.progress import Console


class Clock:
    """Turned by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("dfu_mlflow.progress.time", clock)
    return clock


@pytest.fixture
def log(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> tuple[Board, io.StringIO]:
    stream = io.StringIO()
    board = Board(clock.monotonic, stream, watched=False)
    monkeypatch.setattr("dfu_mlflow.phases.board", lambda: board)
    return board, stream


FIGURES = {"step/loss": 0.1234, "step/images_per_s": 54.3}


def test_the_time_left_counts_steps_and_evaluations_apart(clock: Clock, log: tuple[Board, io.StringIO]) -> None:
    board, stream = log
    console = Console(epochs=2, steps_per_epoch=10)
    with console.evaluating(0):
        clock.seconds += 6
        board.tick()
        clock.seconds += 24
    for step in range(1, 6):
        clock.seconds += 2
        console.step(step, FIGURES)
    board.tick()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training 0 of 20 steps > evaluating the untouched base: 6 s"
    assert lines[1] == "evaluating the untouched base: 30 s"
    clock.seconds += 14
    board.tick()
    line = stream.getvalue().splitlines()[-1]  # 15 steps of 2 s and two evaluations of 30 s
    assert line == "training: 5 of 20 steps, epoch 1/2, loss 0.123, 54 images/s, 54 s, 90 s left"
    console.close()
    assert stream.getvalue().splitlines()[-1] == "training: 5 of 20 steps, 54 s"
    board.tick()
    console.close()


def test_a_resumed_training_begins_where_it_was(clock: Clock, log: tuple[Board, io.StringIO]) -> None:
    board, stream = log
    console = Console(epochs=1, steps_per_epoch=100)
    for step in (51, 52):
        clock.seconds += 8
        console.step(step, FIGURES)
    board.tick()
    assert "training: 52 of 100 steps" in stream.getvalue()
    assert stream.getvalue().strip().endswith(", 6 min 24 s left")
    console.close()


def test_rows_that_are_computed_are_counted_by_name(
    clock: Clock, log: tuple[Board, io.StringIO], tmp_path: Path
) -> None:
    board, stream = log

    def compute(positions: list[int]) -> torch.Tensor:
        clock.seconds += 20
        board.tick()
        return torch.zeros(len(positions), 2)

    cache, keys = RowCache(tmp_path), [f"{number:064x}" for number in range(8)]
    cache.rows("latents", keys, compute, 4, Work("caching latents"))
    assert stream.getvalue().splitlines() == [
        "caching latents: 0 of 8 pictures, 20 s",
        "caching latents: 4 of 8 pictures, 40 s, 40 s left",
        "caching latents: 8 of 8 pictures, 40 s",
    ]
    cache.rows("latents", keys, compute, 4, Work("caching latents"))  # all are there: nothing is counted
    assert len(stream.getvalue().splitlines()) == 3
