"""What every rank does in a training run; `training_run` adds what the main one alone does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dfu_mlflow.base.adapters import copy_from_file
from dfu_mlflow.base.origin import Origin
from dfu_mlflow.checkpoint import CheckpointStore
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.confirmation import Candidate
from dfu_mlflow.ema import copy_into
from dfu_mlflow.engine_choice import build_accelerator
from dfu_mlflow.evaluation_budget import EvaluationPlan
from dfu_mlflow.evaluator import Evaluator, Observation
from dfu_mlflow.panels import Panels
from dfu_mlflow.preparation import Material, sampling_settings
from dfu_mlflow.quick_evaluation import SAME, quick_evaluator, quick_part
from dfu_mlflow.ranks import Ranks
from dfu_mlflow.runtime import release_memory
from dfu_mlflow.trainer import Hooks, Parts, Score, Trainer


@dataclass(frozen=True)
class TrainingResult:
    """How a training run ended.

    Attributes:
        run_id: the MLflow run.
        folder: checkpoints, history and the bundle.
        bundle: the best checkpoint as a sampler, None if nothing was trained.
        best_epoch: its epoch.
        shown: its weights, `live` or `ema`.
        figures: its figures, of full evaluations alone.
        verdict: against the configured success criterion.
    """

    run_id: str
    folder: Path
    bundle: Path | None
    best_epoch: int
    shown: str
    figures: dict[str, float]
    verdict: str


@dataclass(frozen=True)
class Equipment:
    """Everything that training works with, built before the MLflow run is opened.

    Attributes:
        material: base, latents and prompts.
        panels: what generated images are measured against.
        parts: what is trained, on what.
        origin: the base, to measure displacement from; the main rank's alone.
        plan: which epochs are evaluated how.
    """

    material: Material
    panels: Panels
    parts: Parts
    origin: Origin | None
    plan: EvaluationPlan


@dataclass(frozen=True)
class Look:
    """One set of weights as an evaluation saw them.

    Attributes:
        moved: their displacement from the base; the main rank's alone.
        full: losses, pictures and features; None where the main rank knows them already, or it was a quick look.
        quick: the same on fewer pictures; None where there is no such evaluation, or it would show what another did.
    """

    moved: float
    full: Observation | None
    quick: Observation | None


class Participant:
    """One rank of a training run: it trains, draws and extracts its share, and follows what the main rank decides.

    Args:
        config: the run's configuration.
        equipment: what it works with.
        ranks: who works together.
        folder: of the run.
        facts: extra entries for the checkpoint's state.
    """

    def __init__(
        self, config: RunConfig, equipment: Equipment, ranks: Ranks, folder: Path, facts: dict[str, Any]
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.material = equipment.material
        self.parts = equipment.parts
        self.panels = equipment.panels
        self.origin = equipment.origin
        self.folder = folder
        self.settings = sampling_settings(config, self.material.train)
        self.evaluator = Evaluator(
            self.material, self.parts.objective, self.settings, self.panels.panels, config.evaluation, ranks
        )
        self.plan = equipment.plan
        self.quick = None if self.plan.quick is None else quick_evaluator(self.evaluator, self.plan.quick)
        hooks = Hooks(
            evaluate=self.evaluate,
            on_step=self.on_step,
            before_checkpoint=self.before_checkpoint,
            should_stop=self.asked_to_stop,
            facts=facts | {"evaluation": asdict(self.plan.protocol)},
            passed=self.passed,
            due=self.plan.due,
        )
        store = CheckpointStore(folder / "checkpoints", config.checkpoint.keep_last)
        accelerator = build_accelerator(self.material.device, config.train.mixed_precision)
        self.trainer = Trainer(self.parts, config, store, hooks, accelerator, ranks)

    def shown(self) -> AbstractContextManager[object]:
        """What shows the training ends with this block."""
        return nullcontext()

    def on_step(self, step: int, figures: dict[str, float]) -> None:
        """A step is done."""

    def passed(self, epoch: int, training: dict[str, float]) -> None:
        """An epoch is done that is not evaluated."""

    def before_checkpoint(self) -> None:
        """A checkpoint is about to be written."""

    def asked_to_stop(self) -> bool:
        """Has this process been asked to stop?"""
        return self.ranks.asked_to_stop()

    def evaluate(self, epoch: int, training: dict[str, float]) -> Score | None:
        """An epoch is done (0: none yet): look at its weights together, and let the main rank say how good they are."""
        release_memory()  # what the steps before left in the allocators' hands
        looks: dict[str, Look] = {}
        for shown in self.shown_weights(epoch):
            with self.weights_of(shown), self.trainer.engine.whole():
                looks[shown] = self.look(epoch, looks.get("live"))
        return self.ranks.decided(lambda: self.conclude(epoch, training, looks), f"the evaluation of epoch {epoch}")

    def look(self, epoch: int, live: Look | None) -> Look:
        """Look at the weights in the UNet; `live` is what was seen of the live ones where these are their average."""
        moved = self.origin.displacement(self.material.pipe.unet) if self.origin and epoch > 0 else 0.0
        if self.quick is None or self.plan.full(epoch):
            return Look(moved, *self.observe(epoch))
        if live is not None and self.ranks.decided(lambda: moved > SAME * live.moved > 0, "the average's coverage"):
            return Look(moved, None, None)
        return Look(moved, None, self.quick.observe(self.config.sampling.batch_size))

    def observe(self, epoch: int) -> tuple[Observation | None, Observation | None]:
        """Look at the weights in the UNet in full, and as quick evaluations do."""
        batch_size = self.config.sampling.batch_size
        full = self.evaluator.observe(batch_size)
        return full, None if self.quick is None else quick_part(self.quick, self.evaluator, full, batch_size)

    def conclude(self, epoch: int, training: dict[str, float], looks: dict[str, Look]) -> Score | None:
        """Measure and log what was seen: the main rank's work."""
        raise NotImplementedError

    def confirm(self) -> None:
        """Training is over: what may be the best by quick figures gets full ones, and these choose.

        Every rank calls this. Weights of an earlier epoch may be left in the UNet.
        """
        if self.quick is None:
            return
        for candidate in self.ranks.decided(self.unconfirmed, "the end of training"):
            with self.weights_again(candidate), self.trainer.engine.whole():
                seen = self.evaluator.observe(self.config.sampling.batch_size)
            self.ranks.decided(partial(self.settle, candidate, seen), f"a full evaluation of epoch {candidate.epoch}")
        self.ranks.decided(self.choose, "the choice of the best checkpoint")

    @contextmanager
    def weights_again(self, candidate: Candidate) -> Iterator[None]:
        """The UNet holds a candidate's weights inside the block; those of an earlier epoch stay there."""
        if candidate.epoch == self.epochs_done:
            with self.weights_of(candidate.shown):
                yield
            return
        if self.ranks.count == 1:  # one tensor after the other: the file of a full fine-tune is as large as the UNet
            with torch.no_grad():
                copy_from_file(self.parts.weights, candidate.file)
        else:
            copy_into(self.parts.weights, self.trainer.engine.parts(load_file(candidate.file)))
        yield

    @property
    def epochs_done(self) -> int:
        """Epochs trained so far."""
        return self.trainer.progress.step // self.trainer.steps_per_epoch

    def unconfirmed(self) -> list[Candidate]:
        """Candidates without full figures, those of the last epoch first: the main rank's work."""
        raise NotImplementedError

    def settle(self, candidate: Candidate, seen: Observation) -> None:
        """Measure and log what was seen in full: the main rank's work."""
        raise NotImplementedError

    def choose(self) -> None:
        """Let full figures say which checkpoint is the best: the main rank's work."""
        raise NotImplementedError

    def finish(self) -> TrainingResult:
        """Export the best checkpoint and say how the run ended: the main rank's work."""
        raise NotImplementedError

    def shown_weights(self, epoch: int) -> list[str]:
        """Live weights always; their average where there is one that differs."""
        averaged = self.parts.ema is not None and epoch > 0 and self.config.evaluation.ema
        return ["live", "ema"] if averaged else ["live"]

    def weights_of(self, shown: str) -> AbstractContextManager[None]:
        """The UNet holds these weights inside the block."""
        return self.parts.ema.applied(self.parts.weights) if shown == "ema" and self.parts.ema else nullcontext()

    def show_draws(self, digests: list[str]) -> None:
        """The first draws of every rank are known."""

    def first_draws(self) -> str:
        """Digest of what is random in this rank's first micro-batch: ranks must differ in it."""
        draws = next(self.parts.batches.of_step(1, 0)).draws
        digest = hashlib.sha256()
        for tensor in (draws.timesteps, draws.noise):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()
