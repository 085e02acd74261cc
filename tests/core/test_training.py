"""The loop: what must hold of every fine-tuning step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from dfu_mlflow.base.load import load_base
from dfu_mlflow.base.origin import Origin
from dfu_mlflow.batches import Reader
from dfu_mlflow.checkpoint import CheckpointStore, load_checkpoint, load_optimizer
from dfu_mlflow.conditioning import encode_prompts
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import merge, validate
from dfu_mlflow.errors import Interrupted, UserError
from dfu_mlflow.optimizers import build_optimizer
from dfu_mlflow.perceptual import GRADIENT_NORMS, gradient_norms, with_gradient_share
from dfu_mlflow.pipeline import build_parts
from dfu_mlflow.preparation import Material, prepare, read_source, sampling_settings
from dfu_mlflow.sampling import Sampler
from dfu_mlflow.trainer import Hooks, Score, Trainer
from dfu_mlflow.types import Batch

Change = dict[str, Any]


def changed(config: RunConfig, change: Change) -> RunConfig:
    return validate(RunConfig, merge(config.model_dump(), change))


def build(config: RunConfig, folder: Path, hooks: Hooks | None = None, material: Material | None = None) -> Trainer:
    """A trainer on real parts that evaluates nothing."""
    parts = build_parts(config, material or prepare(config, read_source(config)))
    hooks = hooks or Hooks(lambda *_: None, lambda *_: None, lambda: None, lambda: False)
    return Trainer(parts, config, CheckpointStore(folder, 2), hooks, Accelerator(cpu=True))


def clones(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.parts.unet.named_parameters()}


@pytest.mark.parametrize("dora", [False, True])
def test_lora_leaves_the_base_untouched_and_starts_as_the_base(
    small_config: RunConfig, tmp_path: Path, dora: bool
) -> None:
    config = changed(small_config, {"adapter": {"method": "lora", "rank": 4, "use_dora": dora}})
    material = prepare(config, read_source(config))
    before = {name: weight.clone() for name, weight in material.base.unet().state_dict().items()}
    trainer = build(config, tmp_path / "c", material=material)
    origin = Origin(trainer.parts.unet, config.adapter)
    assert origin.displacement(trainer.parts.unet) == 0.0
    trainer.fit()
    after = trainer.parts.unet.state_dict()
    for name, value in before.items():
        stem, kind = name.rsplit(".", 1)
        wrapped = f"{stem}.base_layer.{kind}"
        assert torch.equal(after[wrapped if wrapped in after else name], value), name
    assert origin.displacement(trainer.parts.unet) > 0.0
    assert all("lora_" in name for name in trainer.parts.weights)


def test_micro_batches_equal_the_full_batch(small_config: RunConfig, tmp_path: Path) -> None:
    once = {"epochs": 1, "steps_per_epoch": 2}
    full = build(changed(small_config, {"train": {**once, "batch_size": 8}}), tmp_path / "a")
    parts = {"train": {**once, "batch_size": 2, "gradient_accumulation_steps": 4}}
    micro = build(changed(small_config, parts), tmp_path / "b")
    for trainer in (full, micro):
        trainer.fit()
    worst = max(float((a - b).abs().max()) for a, b in zip(clones(full).values(), clones(micro).values(), strict=True))
    # Adam turns a rounding difference of the gradient near zero into a difference of at most the step size.
    assert worst < 2e-5


def test_a_step_that_was_read_ahead_is_not_read_again(small_config: RunConfig, tmp_path: Path) -> None:
    trainer = build(small_config, tmp_path)
    read: list[tuple[int, int]] = []
    of_step = trainer.parts.batches.of_step

    def noted(epoch: int, position: int) -> Iterator[Batch]:
        read.append((epoch, position))
        return of_step(epoch, position)

    trainer.parts.batches.of_step = noted  # type: ignore[method-assign]
    reader = Reader(trainer.parts.batches, torch.device("cpu"))
    first = reader.of_step(1, 0)
    reader.fetch(1, 1)
    ahead, later = reader.of_step(1, 1), reader.of_step(2, 1)
    assert read == [(1, 0), (1, 1), (2, 1)]
    for batches, place in ((first, (1, 0)), (ahead, (1, 1)), (later, (2, 1))):
        for batch, expected in zip(batches, of_step(*place), strict=True):
            assert batch.names == expected.names
            assert torch.equal(batch.latents, expected.latents)
            assert torch.equal(batch.draws.noise, expected.draws.noise)


def test_a_compiled_step_learns_what_a_plain_one_does(
    small_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Graphs are captured and differentiated as always; what is left out is two minutes of g++.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    train = {"epochs": 1, "steps_per_epoch": 3, "batch_size": 2}
    plain, compiled = (
        build(changed(small_config, {"train": {**train, "compile": chosen}}), tmp_path / str(chosen))
        for chosen in (False, True)
    )
    start = clones(plain)
    for trainer in (plain, compiled):
        trainer.fit()
    assert type(compiled.unet) is not type(plain.unet)
    assert set(compiled.parts.weights) == set(plain.parts.weights), "checkpoints are the same"
    a, b = clones(plain), clones(compiled)
    moved = max(float((a[name] - start[name]).abs().max()) for name in a)
    # Adam turns a rounding difference of the gradient near zero into a difference of at most the step size.
    typical = float(torch.cat([(a[name] - b[name]).abs().flatten() for name in a]).quantile(0.99))
    assert typical < 1e-3 * moved


def test_text_encoders_are_given_up_and_pictures_stay_the_same(small_config: RunConfig) -> None:
    material = prepare(small_config, read_source(small_config))
    assert all(getattr(material.pipe, part) is None for part in ("text_encoder", "text_encoder_2", "unet"))
    settings = sampling_settings(small_config, material.train)
    whole = load_base(small_config.base_model)
    told = encode_prompts(whole, material.source.prompts, "")
    before = Sampler(whole, told, settings, 2).generate(torch.tensor([0, 2]), [1, 2])
    build_parts(small_config, material)
    assert all(getattr(material.pipe, part) is None for part in ("text_encoder", "text_encoder_2"))
    sampler = Sampler(material.pipe, material.conditioner, settings, 2)
    assert np.array_equal(sampler.generate(torch.tensor([0, 2]), [1, 2]), before)


def test_one_batch_overfits(small_config: RunConfig, tmp_path: Path) -> None:
    change = {
        "train": {
            "epochs": 1,
            "steps_per_epoch": 150,
            "batch_size": 4,
            "learning_rate": 3e-3,
            "lr_schedule": "constant",
        },
        "prompts": {"dropout": 0.0},
    }
    trainer = build(changed(small_config, change), tmp_path)
    trainer.progress.epoch = 1
    trainer.parts.unet.train()
    batch = next(trainer.parts.batches.of_step(1, 0))
    losses = []
    for _ in range(150):
        losses.append(float(trainer.forward_backward(batch, last=True)["loss"]))
        trainer.set_learning_rate()
        trainer.update()
        trainer.progress.step += 1
    assert losses[-1] < 0.35 * losses[0]


def test_resumed_equals_unbroken_bit_for_bit(small_config: RunConfig, tmp_path: Path) -> None:
    unbroken = build(small_config, tmp_path / "a")
    unbroken.fit()

    seen: list[int] = []

    def stop_after(count: int) -> Callable[[], bool]:
        def asked() -> bool:
            seen.append(1)
            return len(seen) == count

        return asked

    hooks = Hooks(lambda *_: None, lambda *_: None, lambda: None, stop_after(4))
    broken = build(small_config, tmp_path / "b", hooks)
    with pytest.raises(Interrupted, match="step 4"):
        broken.fit()
    resumed = build(small_config, tmp_path / "b")
    resumed.restore(load_checkpoint(resumed.store.complete()[-1]))
    resumed.fit()
    assert resumed.progress.step == unbroken.progress.step == 6
    for name, value in clones(unbroken).items():
        assert torch.equal(value, clones(resumed)[name]), name
    for name, value in unbroken.parts.ema.average.items():  # type: ignore[union-attr]
        assert torch.equal(value, resumed.parts.ema.average[name]), name  # type: ignore[union-attr]


def test_training_goes_on_from_the_best_checkpoint(small_config: RunConfig, tmp_path: Path) -> None:
    config = changed(small_config, {"train": {"epochs": 4, "steps_per_epoch": 1}, "checkpoint": {"keep_last": 1}})

    def hooks(best: int) -> Hooks:
        def judged(epoch: int, figures: dict[str, float]) -> Score:
            return Score(0.0 if epoch == best else 1.0, "live")

        return Hooks(judged, lambda *_: None, lambda: None, lambda: False)

    first = build(config, tmp_path, hooks(best=1))
    first.fit()
    best = first.store.best() or {}
    assert best["checkpoint"] == "step-00000001"
    again = build(config, tmp_path, hooks(best=3))
    again.restore(load_checkpoint(again.store.folder / best["checkpoint"]))
    again.fit()
    assert (again.store.best() or {})["checkpoint"] == "step-00000001", "as good as epoch 3, and earlier"
    assert again.store.complete()[-1].name == "step-00000004"
    for name, value in clones(first).items():
        assert torch.equal(value, clones(again)[name]), name


def test_epochs_that_are_not_evaluated_have_losses_too(small_config: RunConfig, tmp_path: Path) -> None:
    train = {"epochs": 4, "steps_per_epoch": 1}
    config = changed(small_config, {"train": train})
    told: list[tuple[str, int, int]] = []

    def hook(kind: str) -> Callable[[int, dict[str, float]], None]:
        return lambda epoch, figures: told.append((kind, epoch, int("train/loss" in figures)))

    build(
        config,
        tmp_path,
        Hooks(
            hook("evaluated"),
            lambda *_: None,
            lambda: None,
            lambda: False,
            passed=hook("passed"),
            due=lambda epoch: epoch == 3,
        ),
    ).fit()
    assert told == [("evaluated", 0, 0), ("passed", 1, 1), ("passed", 2, 1), ("evaluated", 3, 1), ("evaluated", 4, 1)]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_optimizer_state_survives_a_checkpoint(small_config: RunConfig, tmp_path: Path, optimizer: str) -> None:
    config = changed(small_config, {"train": {"optimizer": optimizer, "epochs": 1}})
    trainer = build(config, tmp_path / "a")
    trainer.fit()
    checkpoint = load_checkpoint(trainer.store.complete()[-1])
    fresh = build_optimizer(trainer.parts.weights.values(), config.train)
    load_optimizer(fresh, checkpoint.optimizer)
    before, after = trainer.parts.optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert before.keys() == after.keys()
    for index, values in before.items():
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[index][key])), (index, key)


def test_nonfinite_steps_are_skipped_counted_and_then_stop_the_run(small_config: RunConfig, tmp_path: Path) -> None:
    config = changed(small_config, {"train": {"max_nonfinite_steps": 2}})
    trainer = build(config, tmp_path)
    batches = trainer.parts.batches
    batches.latents = replace(batches.latents, moments=torch.full(batches.latents.moments.shape, float("nan")))
    before = clones(trainer)
    with pytest.raises(UserError, match=r"2 steps in a row, last at step 2 on .*\.png.*last good checkpoint: .*step-"):
        trainer.fit()
    assert trainer.progress.nonfinite == 2
    for name, value in clones(trainer).items():
        assert torch.equal(value, before[name]), f"{name} was changed by a skipped step"


def test_the_search_for_a_loss_scale_is_no_fault(small_config: RunConfig, tmp_path: Path) -> None:
    """Counted are steps whose loss itself is broken, or that overflow at a scale that cannot be the reason."""
    trainer = build(small_config, tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    trainer.account({"loss": 0.5}, math.inf, [])
    assert (trainer.progress.step, trainer.progress.nonfinite, trainer.progress.nonfinite_in_row) == (1, 0, 0)
    trainer.account({"loss": math.nan}, math.nan, [])
    assert (trainer.progress.nonfinite, trainer.progress.nonfinite_in_row) == (1, 1)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer.account({"loss": 0.5}, math.inf, [])
    assert trainer.epoch_figures()["train/nonfinite_steps"] == 2.0


def test_perceptual_term_has_gradient_and_a_dead_one_is_seen(small_config: RunConfig, tmp_path: Path) -> None:
    change = {"loss": {"perceptual_loss": {"enabled": True, "weight": 1.0, "max_timestep": 1000}}}
    trainer = build(changed(small_config, change), tmp_path)
    trainer.progress.epoch = 1
    batch = next(trainer.parts.batches.of_step(1, 0))
    terms = trainer.losses(batch, trainer.unet)
    assert terms.perceptual is not None
    assert float(terms.perceptual.detach().mean()) > 0
    weights = list(trainer.parts.weights.values())
    norms = gradient_norms({"diffusion": terms.diffusion.mean(), "perceptual": terms.perceptual.mean()}, weights)
    terms.perceptual.mean().backward(retain_graph=True)
    own = torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]).norm()
    assert norms["perceptual"] == pytest.approx(float(own), rel=1e-4)
    dead = {"diffusion": terms.diffusion.mean(), "perceptual": terms.perceptual.detach().mean()}
    assert gradient_norms(dead, weights) == {"diffusion": norms["diffusion"], "perceptual": 0.0}
    share = with_gradient_share(trainer.gradient_norms([batch, batch]))["grad_share_perceptual"]
    assert share == pytest.approx(norms["perceptual"] / sum(norms.values()), rel=1e-3)
    assert with_gradient_share({"loss": 1.0, **dict.fromkeys(GRADIENT_NORMS, 0.0)}) == {
        "loss": 1.0,
        "grad_share_perceptual": 0.0,
    }


def test_perceptual_term_leaves_out_what_is_above_its_window(small_config: RunConfig, tmp_path: Path) -> None:
    change = {"loss": {"perceptual_loss": {"enabled": True, "max_timestep": 100}}}
    trainer = build(changed(small_config, change), tmp_path)
    term = trainer.parts.objective.perceptual
    assert term is not None
    latents = torch.randn(3, 4, 16, 16)
    loss = term(latents + 0.5, latents, torch.tensor([50, 100, 900]))
    assert loss[0] > 0
    assert loss[1] == loss[2] == 0
    assert torch.equal(term(latents, latents, torch.tensor([50, 60, 70])), torch.zeros(3))


def test_learning_rate_reaches_its_planned_end_in_optimizer_steps(small_config: RunConfig, tmp_path: Path) -> None:
    rates: list[float] = []
    hooks = Hooks(lambda *_: None, lambda _, figures: rates.append(figures["step/lr"]), lambda: None, lambda: False)
    change = {
        "train": {"gradient_accumulation_steps": 3, "batch_size": 2, "lr_schedule": "linear", "learning_rate": 1.0}
    }
    build(changed(small_config, change), tmp_path, hooks).fit()
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_class_balance_and_sample_numbers_are_the_epochs(small_config: RunConfig, tmp_path: Path) -> None:
    trainer = build(changed(small_config, {"train": {"batch_size": 6}}), tmp_path)
    ids = []
    for epoch in (1, 2):
        for position in range(3):
            for batch in trainer.parts.batches.of_step(epoch, position):
                assert sorted(torch.bincount(batch.class_ids, minlength=3).tolist()) == [2, 2, 2]
                ids += batch.sample_ids
    assert ids == list(range(36))
