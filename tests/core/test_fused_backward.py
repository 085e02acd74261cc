"""The optimizer's step inside the backward pass: the same training, without gradients to keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from dfu_mlflow.checkpoint import CheckpointStore, load_checkpoint, load_optimizer, optimizer_tensors
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import merge, validate
from dfu_mlflow.config.schema import TrainConfig
from dfu_mlflow.engine_choice import check_launch
from dfu_mlflow.errors import ConfigError, Interrupted, UserError
from dfu_mlflow.fused import BackwardOptimizer
from dfu_mlflow.optimizers import build_optimizer
from dfu_mlflow.pipeline import build_parts
from dfu_mlflow.preparation import prepare, read_source
from dfu_mlflow.resume import check_same_run
from dfu_mlflow.trainer import Hooks, Trainer

Build = Callable[..., Trainer]
Tensors = dict[str, torch.Tensor]


def optimizers() -> list[Any]:
    """All three; 8-bit AdamW where its package is installed."""
    return ["adamw", "adafactor", "adamw_8bit"]


@pytest.fixture
def build(small_config: RunConfig, tmp_path: Path) -> Build:
    """Makes trainers on real parts without clipping, each in a folder of its own, that evaluate nothing."""

    def make(folder: str, should_stop: Callable[[], bool] = lambda: False, **train: Any) -> Trainer:
        if train.get("optimizer") == "adamw_8bit":
            pytest.importorskip("bitsandbytes")
        tree = merge(small_config.model_dump(), {"train": {"max_grad_norm": None, "epochs": 1, **train}})
        config = validate(RunConfig, tree)
        hooks = Hooks(lambda *_: None, lambda *_: None, lambda: None, should_stop)
        parts = build_parts(config, prepare(config, read_source(config)))
        return Trainer(parts, config, CheckpointStore(tmp_path / folder, 2), hooks, Accelerator(cpu=True))

    return make


def state(trainer: Trainer) -> Tensors:
    """Weights, average and the optimizer's state."""
    assert trainer.parts.ema is not None
    named = {f"weights.{name}": weight.detach().clone() for name, weight in trainer.parts.weights.items()}
    named |= {f"ema.{name}": value.clone() for name, value in trainer.parts.ema.average.items()}
    return named | {f"optimizer.{name}": value.clone() for name, value in trainer.engine.state(wanted=True).items()}


def assert_same(first: Tensors, second: Tensors) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("optimizer", optimizers())
def test_same_weights_average_and_state_as_with_gradients_kept(
    build: Build, optimizer: str, checkpointing: bool
) -> None:
    change = {"optimizer": optimizer, "gradient_checkpointing": checkpointing, "steps_per_epoch": 4}
    kept, fused = build("a", **change), build("b", **change, fused_backward=True)
    before = state(kept)
    kept.fit()
    fused.fit()
    assert kept.progress.sums["loss"] == pytest.approx(fused.progress.sums["loss"], rel=1e-6)
    first, second = state(kept), state(fused)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-7, msg=name)
    moved = [name for name in before if name in first and not torch.equal(before[name], first[name])]
    assert len(moved) > 0.9 * len(before), "training changed nothing that could differ"


def test_one_gradient_exists_at_a_time(build: Build) -> None:
    trainer = build("a", fused_backward=True)
    weights = list(trainer.parts.weights.values())
    alive: list[int] = []
    for weight in weights:
        weight.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(one.grad is not None for one in weights))  # after ours: none is left
        )
    trainer.progress.epoch = 1
    batch = next(trainer.parts.batches.of_step(1, 0))
    trainer.forward_backward(batch, last=True)
    assert len(alive) == len(weights)
    assert set(alive) == {0}
    norm = trainer.update()

    whole = build("b")
    whole.progress.epoch = 1
    whole.forward_backward(batch, last=True)
    assert all(weight.grad is not None for weight in whole.parts.weights.values())
    assert norm == pytest.approx(whole.update(), rel=1e-5)


@pytest.mark.parametrize("optimizer", optimizers())
@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_a_run_goes_on_fused_or_not_as_if_unbroken(build: Build, optimizer: str, before: bool, after: bool) -> None:
    change = {"optimizer": optimizer, "steps_per_epoch": 4, "lr_schedule": "linear"}
    unbroken = build("a", **change, fused_backward=after)
    unbroken.fit()
    asked: list[bool] = []
    broken = build("b", lambda: asked.append(True) or len(asked) == 2, **change, fused_backward=before)  # type: ignore[func-returns-value]
    with pytest.raises(Interrupted, match="step 2"):
        broken.fit()
    resumed = build("b", **change, fused_backward=after)
    checkpoint = load_checkpoint(resumed.store.complete()[-1])
    check_same_run(replace(checkpoint, state={**checkpoint.state, "data": ""}), resumed.config, "")
    resumed.restore(checkpoint)
    resumed.fit()
    assert resumed.progress.step == 4
    first, second = state(unbroken), state(resumed)
    if before == after:
        assert_same(first, second)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_a_loss_that_is_not_finite_changes_nothing(build: Build) -> None:
    trainer = build("a", fused_backward=True, max_nonfinite_steps=2)
    trainer.progress.epoch = 1
    trainer.train_step(0)
    batches = trainer.parts.batches
    batches.latents = replace(batches.latents, moments=torch.full(batches.latents.moments.shape, float("nan")))
    trainer.reader.ahead = None
    before = state(trainer)
    trainer.train_step(1)
    assert_same(before, state(trainer))
    assert (trainer.progress.nonfinite, trainer.progress.nonfinite_in_row) == (1, 1)
    with pytest.raises(UserError, match=r"2 steps in a row, last at step 3 on .*\.png"):
        trainer.train_step(2)
    assert_same(before, state(trainer))


def test_a_gradient_that_is_not_finite_reaches_no_weight(build: Build) -> None:
    trainer = build("a", fused_backward=True)
    trainer.progress.epoch = 1
    trainer.train_step(0)
    name = next(name for name in trainer.parts.weights if "mid_block" in name)  # its loss stays finite
    handle = trainer.parts.weights[name].register_hook(lambda gradient: gradient * math.inf)
    before, average = state(trainer), trainer.parts.ema.updates  # type: ignore[union-attr]
    trainer.train_step(1)
    after = state(trainer)
    assert trainer.progress.nonfinite == 1
    assert trainer.parts.ema.updates == average  # type: ignore[union-attr]
    assert all(torch.isfinite(value).all() for value in after.values())
    index = list(trainer.parts.weights).index(name)
    still = [f"weights.{name}", f"weights.{next(iter(trainer.parts.weights))}", f"optimizer.{index}.exp_avg"]
    assert all(torch.equal(before[one], after[one]) for one in still), "it, or one that came after it, was stepped"
    handle.remove()
    trainer.train_step(2)
    assert trainer.progress.nonfinite_in_row == 0
    assert not torch.equal(state(trainer)[f"weights.{name}"], before[f"weights.{name}"])


def test_gradients_of_other_backward_passes_step_nothing(build: Build) -> None:
    trainer = build("a", fused_backward=True)
    before = state(trainer)
    sum(weight.pow(2).sum() for weight in trainer.parts.weights.values()).backward()  # type: ignore[union-attr]
    assert all(weight.grad is not None for weight in trainer.parts.weights.values())
    assert_same(before, state(trainer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "it needs --train.gradient_accumulation_steps 1, not 2"),
        ({"max_grad_norm": 1.0}, "it needs --train.max_grad_norm null, not 1"),
        ({"mixed_precision": "fp16"}, "it needs --train.mixed_precision bf16 or no"),
        ({"compile": True}, "use one of the two"),
    ],
)
def test_what_needs_every_gradient_at_once_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(RunConfig, {"train": {"fused_backward": True, "max_grad_norm": None, **change}})


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    train = validate(RunConfig, {"train": {"fused_backward": True, "max_grad_norm": None}}).train
    check_launch(train, 1)
    with pytest.raises(UserError, match=r"2 run: .* --train.fused_backward false"):
        check_launch(train, 2)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"--train.fused_backward false"):
        check_launch(train, 1)


@pytest.mark.parametrize("name", optimizers())
def test_states_cross_over_bit_for_bit(name: Any) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    config = TrainConfig(optimizer=name, fused_backward=True, max_grad_norm=None)
    rows = torch.randn(8, 40)

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 120), nn.SiLU(), nn.Linear(120, 3))  # 4,800 weights: in 8 bit

    def step(net: nn.Module, optimizer: torch.optim.Optimizer | BackwardOptimizer) -> None:
        if isinstance(optimizer, BackwardOptimizer):
            with optimizer.updating():
                net(rows).pow(2).mean().backward()
        else:
            net(rows).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    nets = [network(), network()]
    built = [build_optimizer(nets[0].parameters(), config), BackwardOptimizer(nets[1].parameters(), config)]
    for _ in range(3):
        for net, optimizer in zip(nets, built, strict=True):
            step(net, optimizer)
    states = [{key: value.clone() for key, value in optimizer_tensors(optimizer).items()} for optimizer in built]
    assert_same(states[0], states[1])
    crossed = [network(), network()]
    for net in crossed:
        net.load_state_dict(nets[0].state_dict())
    others = [build_optimizer(crossed[0].parameters(), config), BackwardOptimizer(crossed[1].parameters(), config)]
    load_optimizer(others[0], states[1])
    load_optimizer(others[1], states[0])
    for net, optimizer in zip([*nets, *crossed], [*built, *others], strict=True):
        step(net, optimizer)
    for net in (nets[1], *crossed):
        assert_same(nets[0].state_dict(), net.state_dict())
