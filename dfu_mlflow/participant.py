"""What every rank does in a training run; `training_run` adds what the main one alone does."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfu_mlflow.base.origin import Origin
from dfu_mlflow.checkpoint import CheckpointStore
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.engine_choice import build_accelerator
from dfu_mlflow.evaluator import Evaluator, Observation
from dfu_mlflow.panels import Panels
from dfu_mlflow.preparation import Material, sampling_settings
from dfu_mlflow.ranks import Ranks
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
        figures: its figures.
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
    """

    material: Material
    panels: Panels
    parts: Parts
    origin: Origin | None


@dataclass(frozen=True)
class Look:
    """One set of weights as an evaluation saw them.

    Attributes:
        seen: losses, pictures and features; None where the main rank knows them already.
        moved: their displacement from the base; the main rank's alone.
    """

    seen: Observation | None
    moved: float


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
        hooks = Hooks(self.evaluate, self.on_step, self.before_checkpoint, self.asked_to_stop, facts, self.passed)
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
        looks = {}
        for shown in self.shown_weights(epoch):
            with self.weights_of(shown), self.trainer.engine.whole():
                moved = self.origin.displacement(self.material.pipe.unet) if self.origin else 0.0
                looks[shown] = Look(self.observe(epoch), moved)
        return self.ranks.decided(lambda: self.conclude(epoch, training, looks), f"the evaluation of epoch {epoch}")

    def observe(self, epoch: int) -> Observation | None:
        """Look at the weights in the UNet."""
        return self.evaluator.observe(self.config.sampling.batch_size)

    def conclude(self, epoch: int, training: dict[str, float], looks: dict[str, Look]) -> Score | None:
        """Measure and log what was seen: the main rank's work."""
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
