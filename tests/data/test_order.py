"""The order in which rows are visited."""

from __future__ import annotations

import numpy as np
import pytest

from dfu_mlflow.data import epoch_order

CLASS_IDS = np.repeat(np.array([0, 1, 2]), [86, 168, 32])


def test_unbalanced_epoch_of_full_length_is_a_permutation() -> None:
    orders = [epoch_order(CLASS_IDS, 286, epoch, 0, balanced=False) for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(286))
    assert not np.array_equal(orders[0], orders[1])


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("count", [1, 50, 286, 1000])
def test_same_arguments_same_order_and_other_seed_another(balanced: bool, count: int) -> None:
    order = epoch_order(CLASS_IDS, count, 4, 7, balanced)
    assert order.dtype == np.int64
    assert order.shape == (count,)
    np.testing.assert_array_equal(order, epoch_order(CLASS_IDS, count, 4, 7, balanced))
    if count > 1:
        assert not np.array_equal(order, epoch_order(CLASS_IDS, count, 4, 8, balanced))


def test_every_window_holds_each_class_nearly_equally_often() -> None:
    labels = CLASS_IDS[epoch_order(CLASS_IDS, 3000, 0, 0, balanced=True)]
    for blocks in (1, 4, 11):
        window = 3 * blocks
        for label in range(3):
            counts = np.convolve(labels == label, np.ones(window, int), "valid")
            assert counts.min() >= blocks - 1
            assert counts.max() <= blocks + 1


def test_balanced_rows_of_a_class_are_seen_equally_often_over_epochs() -> None:
    visited = np.concatenate([epoch_order(CLASS_IDS, 100, epoch, 0, balanced=True) for epoch in range(63)])
    for label in range(3):
        rows = np.flatnonzero(label == CLASS_IDS)
        times = np.bincount(visited, minlength=len(CLASS_IDS))[rows]
        assert times.max() - times.min() <= 1
        assert times.sum() == 2100


def test_unbalanced_rows_are_seen_equally_often_over_short_epochs() -> None:
    visited = np.concatenate([epoch_order(CLASS_IDS, 77, epoch, 0, balanced=False) for epoch in range(40)])
    times = np.bincount(visited, minlength=len(CLASS_IDS))
    assert times.max() - times.min() <= 1


def test_absent_classes_and_gaps_in_ids_do_not_matter() -> None:
    order = epoch_order(np.array([5, 5, 9]), 8, 0, 0, balanced=True)
    assert (order == 2).sum() == 4


def test_nothing_to_order_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot order"):
        epoch_order(np.array([], dtype=np.int64), 3, 0, 0, balanced=True)
