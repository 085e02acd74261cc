"""The base and a subject seen alike: the same seeds, panels and validation grid, whatever draws the pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.evaluator import Drawn, Evaluator, assess, extract, flatten_reports, sample_grids
from dfu_mlflow.metrics.extractors.pixels import value_signs
from dfu_mlflow.metrics.reference import MIN_IMAGES
from dfu_mlflow.metrics.value_range import require_photographic
from dfu_mlflow.objective import Objective
from dfu_mlflow.panels import Panels
from dfu_mlflow.photograph_features import PhotographFeatures
from dfu_mlflow.preparation import Material
from dfu_mlflow.ranks import Ranks
from dfu_mlflow.sampling import Sampler
from dfu_mlflow.subject import Pictures, Subject, base_sampler
from dfu_mlflow.types import EvalReport
from dfu_mlflow.validation import validation_figures

BASE, FILES = "base", "files"


@dataclass(frozen=True)
class Sighting:
    """Everything that was measured on one source of pictures.

    Attributes:
        drawn: its pictures.
        features: float64 [M, D] of the counted ones, one a panel.
        reports: one a panel.
        losses: validation losses, float64 [K, T]; None for pictures from a folder.
        figures: metric name -> value, as MLflow shows them.
        grids: class label -> uint8 [H, W, 3].
        seeded: drawn from the seeds that every evaluation draws from, so that it pairs with others.
    """

    drawn: Drawn
    features: tuple[torch.Tensor, ...]
    reports: tuple[EvalReport, ...]
    losses: torch.Tensor | None
    figures: dict[str, float]
    grids: dict[str, np.ndarray]
    seeded: bool


def check_subject(config: RunConfig, material: Material, subject: Subject) -> None:
    """What can be known to be wrong before anything is drawn.

    Raises:
        UserError: for a sampler of other classes than the photographs', fewer pictures than any distance needs, or
            pictures whose values are wrapped, inverted or not scaled.
    """
    classes = material.conditioner.classes
    if subject.sampler is not None and subject.sampler.classes != classes:
        raise UserError(
            f"the sampler draws classes {', '.join(subject.sampler.classes)}, the photographs show "
            f"{', '.join(classes)}: give the photographs it was trained for"
        )
    numbers = {"held-out photographs": len(material.source.split.held_out)}
    if subject.pictures is not None:
        numbers["pictures of --source"] = len(subject.pictures.images)
    for what, number in numbers.items():
        if number < MIN_IMAGES:
            raise UserError(f"{number} {what} are fewer than the {MIN_IMAGES} that the least demanding distance needs")
    if subject.pictures is not None and config.metrics.check_value_range:
        images = torch.from_numpy(subject.pictures.images)
        signs = value_signs(int(images.shape[1]), material.device)
        photographs = PhotographFeatures(signs, config, material).photographs(material.source.split.held_out)
        require_photographic(signs(images), photographs, "the pictures of --source")


class Observer:
    """Measures base and subject by the same panels.

    Args:
        config: what is measured.
        material: photographs and base.
        panels: what pictures are measured against.
        ranks: who shares the work.
    """

    def __init__(self, config: RunConfig, material: Material, panels: Panels, ranks: Ranks) -> None:
        self.config = config
        self.material = material
        self.panels = panels
        self.ranks = ranks
        self.classes = material.conditioner.classes

    def base(self) -> Sighting:
        """The untouched base with the configured prompts: the ceiling."""
        return self.of_sampler(base_sampler(self.config, self.material), BASE, None)

    def subject(self, subject: Subject, base: Sighting) -> Sighting:
        """What is evaluated."""
        if subject.sampler is not None:
            return self.of_sampler(subject.sampler, subject.shown, base)
        assert subject.pictures is not None
        return self.of_pictures(subject.pictures, base)

    def of_sampler(self, sampler: Sampler, shown: str, base: Sighting | None) -> Sighting:
        """Draw with a sampler and measure it by its own prompts, settings and UNet."""
        evaluator = self._evaluator(sampler)
        losses = evaluator.losses() if self._shares_autoencoder(sampler) else None
        drawn = evaluator.draw(sampler.batch_size)
        sighting = self._measured(drawn, shown, base, losses)
        if losses is not None:
            before = None if base is None else base.losses
            validation = validation_figures(losses, before, evaluator.grid.timesteps)
            sighting.figures.update({f"val/{name}": value for name, value in validation.items()})
        return sighting

    def of_pictures(self, pictures: Pictures, base: Sighting) -> Sighting:
        """Measure pictures that somebody else drew."""
        images = torch.from_numpy(pictures.images)
        drawn = Drawn(pictures.images, pictures.class_ids, torch.ones(len(images), dtype=torch.bool))
        return self._measured(drawn, FILES, base, None)

    def _measured(self, drawn: Drawn, shown: str, base: Sighting | None, losses: torch.Tensor | None) -> Sighting:
        panels = self.panels.panels
        features = extract(panels, drawn, self.ranks)
        reports = assess(panels, drawn, features, base.reports if base else None, shown)
        figures = {f"eval/{name}": value for name, value in flatten_reports(reports).items()}
        grids = sample_grids(drawn, self.classes, self.config.evaluation.grid_per_class)
        return Sighting(drawn, features, reports, losses, figures, grids, shown != FILES)

    def _evaluator(self, sampler: Sampler) -> Evaluator:
        material = replace(self.material, pipe=sampler.pipe, conditioner=sampler.conditioner)
        objective = Objective(dict(sampler.pipe.scheduler.config), self.config.loss, None)
        evaluation, panels = self.config.evaluation, self.panels.panels
        return Evaluator(material, objective, sampler.settings, panels, evaluation, self.ranks, lambda: sampler.unet)

    def _shares_autoencoder(self, sampler: Sampler) -> bool:
        """Held-out latents are the base's: another autoencoder's UNet has nothing to say about them."""
        return sampler.pipe.vae is self.material.pipe.vae
