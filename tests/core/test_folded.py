"""Rows of sample pictures as the blocks that MLflow shows."""

from __future__ import annotations

import numpy as np
import pytest

from dfu_mlflow.evaluator import folded


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (4, 2, 2), (6, 2, 3), (7, 1, 7), (8, 2, 4)]
)
def test_a_row_becomes_a_block_without_gaps(count: int, rows: int, columns: int) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (count, 5, 5, 3), dtype=np.uint8)
    block = folded(np.concatenate(list(pictures), axis=1))
    lines = [np.concatenate(list(pictures[start : start + columns]), axis=1) for start in range(0, count, columns)]
    assert block.shape == (rows * 5, columns * 5, 3)
    np.testing.assert_array_equal(block, np.concatenate(lines))
