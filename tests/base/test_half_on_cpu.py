"""bf16 through float32 gives what bf16 gives, in answers and gradients, and leaves other precisions alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dfu_mlflow.base import half_on_cpu
from dfu_mlflow.base.half_on_cpu import speed_up_half

CPU = torch.device("cpu")
MADE = {
    "linear": (lambda: nn.Linear(48, 32), (3, 7, 48)),
    "without bias": (lambda: nn.Linear(48, 32, bias=False), (5, 48)),
    "convolution": (lambda: nn.Conv2d(8, 16, 3, padding=1), (2, 8, 10, 10)),
    "strided": (lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1), (2, 8, 10, 10)),
    "pointwise": (lambda: nn.Conv2d(8, 16, 1), (2, 8, 6, 6)),
}


def results(module: nn.Module, given: torch.Tensor, half: bool) -> list[torch.Tensor]:
    given = given.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        answer = module(given)
    answer.float().pow(2).sum().backward()
    gradients = [weight.grad for weight in module.parameters()]
    module.zero_grad(set_to_none=True)
    return [answer.detach(), given.grad, *gradients]  # type: ignore[list-item]


@pytest.mark.parametrize("name", MADE)
def test_answers_and_gradients_are_those_of_bf16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    build, shape = MADE[name]
    module: Any = build()
    given = torch.randn(shape)
    plain, plain_float = results(module, given, half=True), results(module, given, half=False)
    monkeypatch.setattr(half_on_cpu, "is_native", lambda: False)
    speed_up_half(module, CPU)
    for found, expected in zip(results(module, given, half=True), plain, strict=True):
        assert found.dtype == expected.dtype
        scale = expected.float().abs().max()
        assert (found.float() - expected.float()).abs().max() <= 0.02 * scale
    assert all(torch.equal(a, b) for a, b in zip(results(module, given, half=False), plain_float, strict=True))


def test_a_processor_with_bf16_computes_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(4, 4)
    monkeypatch.setattr(half_on_cpu, "is_native", lambda: True)
    speed_up_half(module, CPU)
    assert "forward" not in vars(module)
    monkeypatch.setattr(half_on_cpu, "is_native", lambda: False)
    speed_up_half(module, torch.device("cuda"))
    assert "forward" not in vars(module)


@pytest.mark.parametrize("name", MADE)
def test_frozen_weights_get_no_gradient_and_keep_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    build, shape = MADE[name]
    module: Any = build()
    monkeypatch.setattr(half_on_cpu, "is_native", lambda: False)
    speed_up_half(module, CPU)
    given = torch.randn(shape)
    learning = results(module, given, half=True)
    module.requires_grad_(False)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        frozen = results(module, given, half=True)
    assert torch.equal(frozen[0], learning[0])
    assert torch.equal(frozen[1], learning[1])
    assert frozen[2:] == [None] * (len(learning) - 2)
    assert all(saved is module.weight or saved.shape == frozen[0].shape for saved in kept), "no rows, no copies"
