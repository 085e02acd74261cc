"""Learning rate schedules and the moving average against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dfu_mlflow.ema import ExponentialMovingAverage
from dfu_mlflow.schedules import lr_factor


def test_schedules_warm_up_peak_and_end() -> None:
    for schedule in ("constant", "cosine", "linear"):
        assert lr_factor(schedule, 0, 10, 100) == 0.1  # type: ignore[arg-type]
        assert lr_factor(schedule, 10, 10, 100) == 1.0  # type: ignore[arg-type]
    assert lr_factor("constant", 99, 10, 100) == 1.0
    assert lr_factor("linear", 55, 10, 100) == 0.5
    assert math.isclose(lr_factor("cosine", 55, 10, 100), 0.5)
    assert lr_factor("cosine", 100, 10, 100) == 0.0
    assert lr_factor("cosine", 99, 10, 100) < 0.001


def test_average_follows_the_closed_form() -> None:
    weight = nn.Parameter(torch.zeros(3))
    ema = ExponentialMovingAverage({"w": weight}, decay=0.9, warmup=False)
    weight.data.fill_(1.0)
    for _ in range(32):
        ema.update({"w": weight})
    assert torch.allclose(ema.average["w"], torch.full((3,), 1 - 0.9**32))


def test_warmup_forgets_the_start_at_once() -> None:
    weight = nn.Parameter(torch.zeros(1))
    ema = ExponentialMovingAverage({"w": weight}, decay=0.999, warmup=True)
    weight.data.fill_(1.0)
    expected, moved = 1.0, 0.0
    for update in range(32):
        assert ema.current_decay() == (1 + update) / (10 + update)
        expected *= (1 + update) / (10 + update)
        ema.update({"w": weight})
        moved = float(ema.average["w"])
    assert math.isclose(moved, 1 - expected, rel_tol=1e-5)
    assert moved > 0.99, "without warm-up 32 updates at 0.999 cover 3 %"


def test_average_is_float32_whatever_the_weights_are() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    ema = ExponentialMovingAverage({"w": weight}, decay=0.999, warmup=False)
    weight.data.fill_(1.0)
    for _ in range(3000):
        ema.update({"w": weight})
    assert float(ema.average["w"]) > 0.9, "kept in bfloat16 it stalls at 0.008"


def test_applied_puts_the_live_weights_back_exactly() -> None:
    weight = nn.Parameter(torch.randn(5))
    live = weight.detach().clone()
    ema = ExponentialMovingAverage({"w": weight}, decay=0.5, warmup=False)
    ema.average["w"].fill_(7.0)
    with ema.applied({"w": weight}):
        assert torch.equal(weight.detach(), torch.full((5,), 7.0))
    assert torch.equal(weight.detach(), live)


def test_the_place_of_the_average_changes_nothing() -> None:
    weight = nn.Parameter(torch.randn(7, dtype=torch.float64))
    beside = ExponentialMovingAverage({"w": weight}, decay=0.9, warmup=True)
    apart = ExponentialMovingAverage({"w": weight}, decay=0.9, warmup=True, place=torch.device("cpu"))
    for _ in range(3):
        with torch.no_grad():
            weight += 1.0
        beside.update({"w": weight})
        apart.update({"w": weight})
    assert torch.equal(beside.average["w"], apart.average["w"])
    assert apart.average["w"].device.type == "cpu"
    assert apart.average["w"].data_ptr() != weight.data_ptr()


def test_other_names_are_refused() -> None:
    ema = ExponentialMovingAverage({"w": nn.Parameter(torch.zeros(1))}, decay=0.5, warmup=False)
    with pytest.raises(ValueError, match="names differ"):
        ema.update({"v": nn.Parameter(torch.zeros(1))})
