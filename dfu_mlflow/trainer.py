"""The training loop. It knows no tracker and no tuner: plain numbers go out through hooks.

fit -> train_epoch -> train_step -> forward_backward.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dfu_mlflow.base.adapters import Weights
from dfu_mlflow.batches import Batches, Reader
from dfu_mlflow.checkpoint import Checkpoint, CheckpointStore, checkpoint_name
from dfu_mlflow.conditioning import Conditioner
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.ema import ExponentialMovingAverage
from dfu_mlflow.engine_choice import build_engine
from dfu_mlflow.errors import Interrupted, UserError
from dfu_mlflow.fused import BackwardOptimizer
from dfu_mlflow.objective import LossTerms, Objective
from dfu_mlflow.perceptual import GRADIENT_NORMS, gradient_norms, with_gradient_share
from dfu_mlflow.phases import phase
from dfu_mlflow.ranks import Ranks
from dfu_mlflow.runtime import derive_seed
from dfu_mlflow.schedules import lr_factor
from dfu_mlflow.types import Batch


@dataclass(frozen=True)
class Parts:
    """What is trained, on what.

    Attributes:
        unet: the network, with adapters if there are any.
        weights: what learns, by name.
        optimizer: over `weights`, in their order.
        objective: the loss.
        conditioner: encoded prompts.
        batches: the training rows, dealt out by step.
        ema: the moving average, or None.
    """

    unet: nn.Module
    weights: Weights
    optimizer: torch.optim.Optimizer | BackwardOptimizer
    objective: Objective
    conditioner: Conditioner
    batches: Batches
    ema: ExponentialMovingAverage | None


@dataclass(frozen=True)
class Score:
    """How good an evaluated checkpoint is.

    Attributes:
        value: smaller is better.
        shown: the weights it was measured on, `live` or `ema`.
    """

    value: float
    shown: str


@dataclass(frozen=True)
class Hooks:
    """How the loop speaks to the outside.

    Attributes:
        evaluate: (epoch, training figures of that epoch) -> score, or None where there is none.
        on_step: (optimizer step, figures).
        before_checkpoint: called before a checkpoint is written, so that what it covers is stored elsewhere first.
        should_stop: asked after each step.
        facts: extra entries for the checkpoint's state.
        passed: (epoch, training figures of that epoch) where that epoch is not evaluated.
        due: is this epoch evaluated? The untouched base and the last epoch always are.
    """

    evaluate: Callable[[int, dict[str, float]], Score | None]
    on_step: Callable[[int, dict[str, float]], None]
    before_checkpoint: Callable[[], None]
    should_stop: Callable[[], bool]
    facts: dict[str, Any] = field(default_factory=dict)
    passed: Callable[[int, dict[str, float]], None] = lambda epoch, figures: None
    due: Callable[[int], bool] = lambda epoch: True


@dataclass
class Progress:
    """Where training stands; everything here is in the checkpoint.

    Attributes:
        step: optimizer steps done, skipped ones included.
        epoch: epochs begun; the epoch of the current step.
        nonfinite: steps skipped so far because of a non-finite loss or gradient, fp16's search for its scale aside.
        nonfinite_in_row: such steps since the last good one.
        sums: running sums of the epoch's figures.
        evaluated: last epoch that was evaluated, -1 before the untouched base was.
        best_score, best_epoch: of the best evaluation so far.
    """

    step: int = 0
    epoch: int = 0
    nonfinite: int = 0
    nonfinite_in_row: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    evaluated: int = -1
    best_score: float | None = None
    best_epoch: int = 0


class Trainer:
    """Fine-tunes a UNet.

    Args:
        parts: what is trained, on what.
        config: the run's configuration.
        store: where checkpoints go.
        hooks: how figures leave.
        accelerator: device placement and precision.
        ranks: the processes that train together; None for this one alone.
    """

    def __init__(
        self,
        parts: Parts,
        config: RunConfig,
        store: CheckpointStore,
        hooks: Hooks,
        accelerator: Accelerator,
        ranks: Ranks | None = None,
    ) -> None:
        self.parts = parts
        self.config = config
        self.store = store
        self.hooks = hooks
        self.accelerator = accelerator
        self.ranks = ranks or Ranks()
        self.progress = Progress()
        self.reader = Reader(parts.batches, accelerator.device)
        self.engine = build_engine(accelerator, parts.unet, parts.weights, parts.optimizer, config)
        self.unet, self.optimizer = self.engine.unet, self.engine.optimizer
        if parts.ema is not None:
            parts.ema.average = self.engine.parts(parts.ema.average)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return self.parts.batches.steps_per_epoch

    def fit(self) -> None:
        """Train to the end, evaluating the untouched base first and every epoch after.

        Raises:
            Interrupted: when asked to stop; a checkpoint has been written.
            UserError: after too many non-finite steps in a row.
        """
        if self.progress.step == 0 and self.progress.evaluated < 0:
            self.save()  # so that a run killed in its first epoch goes on as the same run
        self.evaluate()
        while self.progress.step < self.config.train.epochs * self.steps_per_epoch and not self.out_of_patience():
            self.train_epoch()
            self.save()
            self.evaluate()

    def train_epoch(self) -> None:
        """Run (or finish) one epoch."""
        epoch, inside = divmod(self.progress.step, self.steps_per_epoch)
        if inside == 0:
            self.progress.sums = {}
        self.progress.epoch = epoch + 1
        self.parts.unet.train()
        every = self.config.checkpoint.every_steps
        for position in range(inside, self.steps_per_epoch):
            self.train_step(position)
            if self.ranks.any(self.hooks.should_stop()):
                self.save()
                raise Interrupted(f"stopped after step {self.progress.step}")
            last = position + 1 == self.steps_per_epoch
            if every and self.progress.step % every == 0 and not last:
                self.save()

    def train_step(self, position: int) -> None:
        """One optimizer update, the `position`-th of its epoch."""
        started = time.perf_counter()
        rate = self.set_learning_rate()
        batches = self.reader.of_step(self.progress.epoch, position)
        figures = self.gradient_norms(batches) if position == 0 else {}
        queued = [self.forward_backward(batch, last=batch is batches[-1]) for batch in batches]
        if position + 1 < self.steps_per_epoch and self.accelerator.device.type == "cuda":
            self.reader.fetch(self.progress.epoch, position + 1)  # while the device computes; a CPU has nothing to gain
        norm = self.update()  # the step's one wait for the device: what was queued before has arrived as well
        losses = [{key: float(value) for key, value in loss.items()} for loss in queued]
        seconds = time.perf_counter() - started
        figures |= {key: sum(loss[key] for loss in losses) / len(losses) for key in losses[0]}
        figures = with_gradient_share(self.ranks.mean(figures))
        self.account(figures, norm, [name for batch in batches for name in batch.names])
        if math.isfinite(norm):
            step_figures = {"step/loss": figures["loss"], "step/grad_norm": norm, "step/lr": rate}
            images = sum(map(len, batches)) * self.ranks.count
            self.hooks.on_step(self.progress.step, step_figures | {"step/images_per_s": images / seconds})

    def forward_backward(self, batch: Batch, last: bool) -> dict[str, torch.Tensor]:
        """Accumulate the gradient of one micro-batch; returns its mean losses, on their way to the CPU."""
        context = nullcontext() if last else self.engine.no_sync()
        with context:
            terms = self.losses(batch, self.unet)
            if last:
                self.ranks.at(f"the gradients of step {self.progress.step + 1}")
            self.engine.backward(terms.total.mean(), last)
        figures = {"loss": terms.total, "loss_diffusion": terms.diffusion}
        figures["loss_perceptual"] = torch.zeros(1) if terms.perceptual is None else terms.perceptual
        return {name: value.detach().mean().to("cpu", non_blocking=True) for name, value in figures.items()}

    def losses(self, batch: Batch, network: nn.Module) -> LossTerms:
        """Loss terms of a micro-batch, each [B], of the UNet as the engine holds it or bare."""
        draws = batch.draws
        torch.manual_seed(derive_seed(self.config.seed, "layers", batch.sample_ids[0]))  # for adapters' dropout
        told = self.parts.conditioner.training(batch.class_ids, draws.dropped, batch.time_ids)
        with self.engine.autocast():
            return self.parts.objective(network, batch.latents, draws.noise, draws.timesteps, told)

    def update(self) -> float:
        """Clip, step, average; a non-finite gradient skips the step. Returns the gradient norm before clipping."""
        norm = self.engine.update()
        if math.isfinite(norm) and self.parts.ema is not None:
            self.parts.ema.update(self.parts.weights)
        return norm

    def account(self, figures: dict[str, float], norm: float, names: list[str]) -> None:
        """Count the step, sum its figures, and stop after too many non-finite ones in a row."""
        self.progress.step += 1
        if math.isfinite(norm):
            self.progress.nonfinite_in_row = 0
            sums = self.progress.sums
            for key, value in (figures | {"steps": 1.0}).items():
                sums[key] = sums.get(key, 0.0) + value
            return
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() > 1.0 and math.isfinite(figures["loss"]):
            return  # fp16 is still finding its loss scale
        self.progress.nonfinite += 1
        self.progress.nonfinite_in_row += 1
        if self.progress.nonfinite_in_row >= self.config.train.max_nonfinite_steps:
            good = self.store.complete()  # rank 0's: the others' folder is not the run's
            shares = self.ranks.everyone((names, good[-1] if good else "none"), "too many non-finite steps")
            shown = sorted({name for share, _ in shares for name in share})[:8]
            raise UserError(
                f"the gradient was not finite for {self.progress.nonfinite_in_row} steps in a row, last at step "
                f"{self.progress.step} on {', '.join(shown)}; last good checkpoint: "
                f"{shares[0][1]}; lower --train.learning_rate or set --train.mixed_precision no",
                private=shown,
            )

    def gradient_norms(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Norm of each loss term's gradient, the mean over the micro-batches of the epoch's first step."""
        if self.parts.objective.perceptual is None:
            return dict.fromkeys(GRADIENT_NORMS, 0.0)
        with self.engine.whole() as weights:
            norms = [self._gradient_norms(batch, list(weights.values())) for batch in batches]
        return {name: sum(each[name] for each in norms) / len(norms) for name in GRADIENT_NORMS}

    def _gradient_norms(self, batch: Batch, weights: Sequence[nn.Parameter]) -> dict[str, float]:
        terms = self.losses(batch, self.parts.unet)  # bare: an engine's hooks wait for a backward pass of their own
        assert terms.perceptual is not None
        named = zip(GRADIENT_NORMS, (terms.diffusion.mean(), terms.perceptual.mean()), strict=True)
        return gradient_norms(dict(named), weights)

    def set_learning_rate(self) -> float:
        """Learning rate of the coming step."""
        train = self.config.train
        factor = lr_factor(
            train.lr_schedule, self.progress.step, train.warmup_steps, train.epochs * self.steps_per_epoch
        )
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * factor
        return train.learning_rate * factor

    def evaluate(self) -> None:
        """Evaluate the epoch just finished, unless that was done before an interruption."""
        epoch = self.progress.step // self.steps_per_epoch
        if epoch <= self.progress.evaluated or self.progress.step % self.steps_per_epoch:
            return
        if epoch not in (0, self.config.train.epochs) and not self.hooks.due(epoch):
            self.hooks.passed(epoch, self.epoch_figures())
            return
        score = self.hooks.evaluate(epoch, self.epoch_figures())
        self.progress.evaluated = epoch
        best = self.progress.best_score
        if score is not None and epoch > 0 and (best is None or score.value < best):
            self.progress.best_score, self.progress.best_epoch = score.value, epoch
            if self.ranks.main:
                facts = {"epoch": epoch, "score": score.value, "shown": score.shown}
                self.store.mark_best(checkpoint_name(self.progress.step), facts)
        if self.ranks.main:
            self.store.amend(self.progress.step, vars(self.progress))

    def epoch_figures(self) -> dict[str, float]:
        """Mean training figures of the epoch."""
        sums = dict(self.progress.sums)
        steps = sums.pop("steps", 0.0)
        figures = {f"train/{key}": value / steps for key, value in sums.items() if steps and "share" not in key}
        shares = {f"train/{key}": value for key, value in sums.items() if "share" in key}
        return figures | shares | {"train/nonfinite_steps": float(self.progress.nonfinite)}

    def out_of_patience(self) -> bool:
        """Has the best score stood for longer than early stopping allows?"""
        patience = self.config.train.early_stopping_patience
        since = range(self.progress.best_epoch + 1, self.progress.evaluated + 1)
        evaluations = sum(map(self.hooks.due, since))
        return patience is not None and self.progress.best_score is not None and evaluations >= patience

    def save(self) -> None:
        """Write a checkpoint of everything that decides what comes next."""
        with phase("writing a checkpoint"):
            self.hooks.before_checkpoint()
            ema, main = self.parts.ema, self.ranks.main
            optimizer = self.engine.state(wanted=main)
            weights = self.engine.joined(self.parts.weights, wanted=main)
            average = {} if ema is None else self.engine.joined(ema.average, wanted=main)
            if main:
                state = {
                    **vars(self.progress),
                    "ema_updates": 0 if ema is None else ema.updates,
                    "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
                    "config": self.config.model_dump(mode="json"),
                    **self.hooks.facts,
                }
                self.store.save(Checkpoint(weights, average, optimizer, state))
            self.ranks.meet("the checkpoint", limited=False)  # a slow disk is no rank that hangs

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue as if never interrupted."""
        state = checkpoint.state
        self.engine.load(checkpoint.weights, checkpoint.optimizer)
        if self.parts.ema is not None:
            self.parts.ema.load(self.engine.parts(checkpoint.ema), int(state["ema_updates"]))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**{key: state[key] for key in vars(Progress())})
        if not self.store.go_back(self.progress.step):
            self.progress.best_score, self.progress.best_epoch = None, 0
