"""Devices by name, and what is done when a device's memory is too small."""

from __future__ import annotations

import pytest
import torch

from dfu_mlflow.errors import UserError
from dfu_mlflow.runtime import in_slices, make_current, pick_device, pick_devices


@pytest.mark.parametrize(("rows", "size", "fits"), [(10, 8, 3), (7, 4, 4), (5, 64, 1), (1, 1, 1), (0, 4, 1)])
def test_rows_come_once_and_in_order_whatever_fits(rows: int, size: int, fits: int) -> None:
    asked = []

    def work(part: slice) -> list[int]:
        asked.append(part.stop - part.start)
        if asked[-1] > fits:
            raise torch.OutOfMemoryError
        return list(range(part.start, part.stop))

    assert [row for piece in in_slices(rows, size, work) for row in piece] == list(range(rows))
    refused = sum(length > fits for length in asked)
    assert refused <= 7, "what did not fit is not tried at every slice again"


def test_one_row_that_does_not_fit_is_said() -> None:
    def work(part: slice) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        in_slices(4, 4, work)


def test_devices_are_those_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_devices("cpu, cpu") == (torch.device("cpu"),) * 2
    with pytest.raises(UserError, match="--device quantum: unknown"):
        pick_device("quantum")
    with pytest.raises(UserError, match="--device cuda:99: torch finds"):
        pick_devices("cpu,cuda:99")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert make_current(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(UserError, match="several processes run"):
        make_current(torch.device("cuda:0"))
