"""A training step on a card against the same step on a CPU, and what only a card does in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dfu_mlflow.checkpoint import load_checkpoint, optimizer_tensors
from dfu_mlflow.config.schema import TrainConfig
from dfu_mlflow.errors import Interrupted
from dfu_mlflow.optimizers import build_optimizer, state_bytes
from dfu_mlflow.runtime import move
from dfu_mlflow.trainer import Trainer

# What libraries warn of on a card is not known yet.
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]

Build = Callable[..., Trainer]
CPU = torch.device("cpu")


def first_step(trainer: Trainer) -> tuple[torch.Tensor, float]:
    """Losses of the first micro-batch, and the norm of its gradient; the step is taken."""
    trainer.progress.epoch = 1
    trainer.parts.unet.train()
    (batch,) = trainer.reader.of_step(1, 0)
    terms = trainer.losses(batch, trainer.unet)
    trainer.engine.backward(terms.total.mean(), last=True)
    return terms.total.detach().cpu(), trainer.update()


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in trainer.parts.weights.items()}


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    ("precision", "loss", "norm"), [("no", 1e-4, 1e-3), ("bf16", 2e-2, 5e-2), ("fp16", 1e-2, 5e-2)]
)
def test_a_step_on_a_card_is_that_of_a_cpu_in_float32(
    build: Build, device: torch.device, precision: str, loss: float, norm: float, method: str
) -> None:
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("fp16 is refused on a CPU")
    adapter = {"method": method, "rank": 4}
    expected, expected_norm = first_step(build(CPU, "cpu", adapter=adapter))
    trainer = build(device, "card", adapter=adapter, train={"mixed_precision": precision})
    found, found_norm = first_step(trainer)
    assert {weight.device.type for weight in trainer.parts.weights.values()} == {device.type}
    torch.testing.assert_close(found, expected, rtol=loss, atol=0.0)
    if math.isfinite(found_norm) or precision != "fp16":  # fp16 may still look for its scale
        assert found_norm == pytest.approx(expected_norm, rel=norm)


def test_fused_adamw_moves_weights_as_the_plain_one_does(device: torch.device) -> None:
    config = TrainConfig(learning_rate=1e-3)
    source = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=source) for shape in ((7,), (64, 64), (16, 8, 3, 3))]
    ours, plain = ([nn.Parameter(value.to(device, copy=True)) for value in start] for _ in range(2))
    fused = build_optimizer(ours, config)
    betas = (config.beta1, config.beta2)
    other = torch.optim.AdamW(
        plain, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay, foreach=False, fused=False
    )
    assert fused.defaults["fused"]
    for _ in range(5):
        for first, second in zip(ours, plain, strict=True):
            first.grad = torch.randn(first.shape, generator=source).to(device)
            second.grad = first.grad.clone()
        fused.step()
        other.step()
    for first, second, value in zip(ours, plain, start, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)
        assert not torch.equal(first.detach().cpu(), value)


@pytest.mark.parametrize("fused_backward", [False, True])
def test_adamw_in_8_bit_trains_keeps_what_is_planned_and_comes_back(
    build: Build, device: torch.device, fused_backward: bool
) -> None:
    pytest.importorskip("bitsandbytes")
    train = {"optimizer": "adamw_8bit", "epochs": 1, "fused_backward": fused_backward, "max_grad_norm": None}
    trainer = build(device, "a", train=train)
    before = weights_of(trainer)
    trainer.fit()
    assert trainer.progress.nonfinite == 0
    assert any(not torch.equal(value, before[name]) for name, value in weights_of(trainer).items())
    state = optimizer_tensors(trainer.parts.optimizer)
    assert any(value.dtype == torch.uint8 for value in state.values())
    kept = sum(value.nbytes for name, value in state.items() if name.split(".")[1] not in ("step", "qmap1", "qmap2"))
    planned = sum(state_bytes(weight.shape, "adamw_8bit") for weight in trainer.parts.weights.values())
    assert kept == pytest.approx(planned, rel=0.01)
    checkpoint = load_checkpoint(trainer.store.complete()[-1])
    again = build(device, "b", train=train)
    again.restore(checkpoint)
    found = optimizer_tensors(again.parts.optimizer)
    assert all(torch.equal(value, found[name]) for name, value in state.items())


def test_what_is_moved_arrives_whole_whatever_becomes_of_its_source(device: torch.device) -> None:
    arrived = []
    for number in range(64):
        source = torch.full((2**16,), float(number))
        arrived.append(move(source, device))
        if device.type == "cuda":  # on a CPU nothing is copied
            source.fill_(-1.0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    assert [tensor.device.type for tensor in arrived] == [device.type] * 64
    assert [tensor.unique().tolist() for tensor in arrived] == [[float(number)] for number in range(64)]


def test_the_next_step_is_read_ahead_on_a_card_alone_and_is_the_right_one(build: Build, device: torch.device) -> None:
    trainer = build(device, "a")
    trainer.progress.epoch = 1
    trainer.parts.unet.train()
    trainer.train_step(0)
    assert trainer.reader.ahead is not None
    assert trainer.reader.ahead[0] == ((1, 1) if device.type == "cuda" else (1, 0))
    for batch, expected in zip(trainer.reader.of_step(1, 1), trainer.parts.batches.of_step(1, 1), strict=True):
        assert batch.names == expected.names
        pairs = [(batch.latents, expected.latents), (batch.time_ids, expected.time_ids)]
        pairs += [(getattr(batch.draws, name), getattr(expected.draws, name)) for name in ("noise", "timesteps")]
        for found, wanted in pairs:
            assert found.device.type == device.type
            assert torch.equal(found.cpu(), wanted)


def test_a_compiled_step_learns_what_a_plain_one_does(
    build: Build, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":  # minutes of g++
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    train = {"epochs": 1, "steps_per_epoch": 3, "batch_size": 2}
    plain = build(device, "plain", train=train)
    start = weights_of(plain)
    plain.fit()
    compiled = build(device, "compiled", train={**train, "compile": True})
    compiled.fit()
    assert type(compiled.unet) is not type(plain.unet)
    first, second = weights_of(plain), weights_of(compiled)
    moved = max(float((first[name] - start[name]).abs().max()) for name in first)
    # Adam turns a rounding difference of the gradient near zero into a difference of at most the step size.
    apart = torch.cat([(first[name] - second[name]).abs().flatten() for name in first])
    assert float(apart.mean()) < 0.02 * moved


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Kernels whose sums have one order; attention's fast ones have none in their backward passes."""
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    "change",
    [
        {"train": {"mixed_precision": "bf16"}},
        {"adapter": {"method": "lora", "rank": 4}, "ema": {"on_host": True}},
        {"train": {"fused_backward": True, "max_grad_norm": None, "optimizer": "adafactor"}},
    ],
    ids=["bf16", "lora with its average on the host", "fused backward"],
)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    build: Build, device: torch.device, change: dict[str, Any]
) -> None:
    unbroken = build(device, "a", **change)
    unbroken.fit()
    expected = weights_of(unbroken) | optimizer_tensors(unbroken.parts.optimizer)
    assert unbroken.parts.ema is not None
    average = {name: value.cpu().clone() for name, value in unbroken.parts.ema.average.items()}
    asked: list[int] = []

    def after_four() -> bool:
        asked.append(1)
        return len(asked) == 4

    broken = build(device, "b", after_four, **change)
    with pytest.raises(Interrupted, match="step 4"):
        broken.fit()
    resumed = build(device, "b", **change)
    resumed.restore(load_checkpoint(resumed.store.complete()[-1]))
    resumed.fit()
    assert resumed.progress.step == unbroken.progress.step == 6
    found = weights_of(resumed) | optimizer_tensors(resumed.parts.optimizer)
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    assert resumed.parts.ema is not None
    assert all(torch.equal(value, resumed.parts.ema.average[name].cpu()) for name, value in average.items())
