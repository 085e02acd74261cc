"""In which order training visits its rows: a pure function of (seed, epoch), so a resumed run continues unbroken."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dfu_mlflow.runtime import derive_seed

Indices = npt.NDArray[np.int64]

BLOCKS = 1024
"""Class orders drawn at once."""


def epoch_order(class_ids: Indices, count: int, epoch: int, seed: int, balanced: bool) -> Indices:
    """Rows visited in an epoch.

    Epochs are consecutive stretches of one endless stream, so that with a constant `count` every row is seen equally
    often over several epochs, also where an epoch is not a whole number of passes. Unbalanced, the stream is one
    shuffled pass over all rows after another. Balanced, it is made of blocks that hold each class once, in shuffled
    order, and each class goes through its own rows in shuffled passes: any window of K blocks' length holds each
    class between K - 1 and K + 1 times.

    Args:
        class_ids: int64 [N], the class of each row.
        count: rows to visit; may exceed N.
        epoch: number of the epoch, from 0.
        seed: of the run.
        balanced: draw every class that occurs equally often.

    Returns:
        int64 [count], positions in `class_ids`.

    Raises:
        ValueError: where there are no rows, or `count` or `epoch` is negative.
    """
    if class_ids.ndim != 1 or len(class_ids) == 0 or count < 0 or epoch < 0:
        raise ValueError(f"cannot order {class_ids.shape} rows, count {count}, epoch {epoch}")
    positions = np.arange(epoch * count, (epoch + 1) * count, dtype=np.int64)
    if not balanced:
        return _passes(np.arange(len(class_ids), dtype=np.int64), positions, seed, "order")
    classes = np.unique(class_ids)
    block, within = np.divmod(positions, len(classes))
    turn = _chunked(block, BLOCKS, lambda chunk: _class_orders(len(classes), seed, chunk))[np.arange(count), within]
    order = np.empty(count, dtype=np.int64)
    for number, label in enumerate(classes):
        chosen = turn == number
        order[chosen] = _passes(np.flatnonzero(class_ids == label), block[chosen], seed, f"order:{label}")
    return order


def _passes(rows: Indices, positions: Indices, seed: int, purpose: str) -> Indices:
    """Elements at `positions` of the endless stream of shuffled passes over `rows`."""
    return _chunked(
        positions,
        len(rows),
        lambda number: np.random.default_rng(derive_seed(seed, purpose, number)).permutation(rows),
    )


def _class_orders(classes: int, seed: int, chunk: int) -> Indices:
    """`BLOCKS` shuffled orders of the classes, int64 [BLOCKS, classes]."""
    orders = np.tile(np.arange(classes, dtype=np.int64), (BLOCKS, 1))
    return np.random.default_rng(derive_seed(seed, "class_order", chunk)).permuted(orders, axis=1)


def _chunked(positions: Indices, length: int, draw: Callable[[int], Indices]) -> Indices:
    """Elements at increasing `positions` of a stream that is drawn in chunks of `length`."""
    chunk, within = np.divmod(positions, length)
    numbers, starts = np.unique(chunk, return_index=True)
    pieces = np.split(within, starts[1:])
    parts = [draw(int(number))[piece] for number, piece in zip(numbers, pieces, strict=False)]
    return np.concatenate(parts) if parts else draw(0)[:0]
