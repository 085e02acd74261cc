"""Are copies of patients' photographs among a subject's pictures, and does it know whom it was trained on?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.data import encode_evaluation_latents, evaluation_pixels
from dfu_mlflow.metrics.closest_pairs import write_closest_pairs
from dfu_mlflow.metrics.coarse_pixels import IDENTITY, coarse_pixels
from dfu_mlflow.metrics.copies import TrainingAppearances
from dfu_mlflow.metrics.membership import MemberLosses, membership_auc
from dfu_mlflow.metrics.memorisation import MemorisationReference, MemorisationReport, Suspect
from dfu_mlflow.objective import Objective
from dfu_mlflow.photograph_features import Features, PhotographFeatures, feature_rows
from dfu_mlflow.preparation import Material
from dfu_mlflow.ranks import Ranks
from dfu_mlflow.sampling import Sampler
from dfu_mlflow.subject import base_sampler
from dfu_mlflow.types import Estimate, Record
from dfu_mlflow.validation import ValidationGrid, grid_rows, validation_losses


class CoarsePixels:
    """`coarse_pixels` as an extractor."""

    identity = IDENTITY

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, H, W, 3] -> float64 [N, 192]."""
        return coarse_pixels(images)


class MemorisationProbe:
    """The photographs of a run, ready to be found again among generated pictures.

    Args:
        config: thresholds.
        material: photographs, autoencoder, cache.
        extractors: name -> extractor; more kinds find more copies.
    """

    def __init__(self, config: RunConfig, material: Material, extractors: Mapping[str, Features]) -> None:
        self.config = config
        self.material = material
        self.extractors = {"pixels": CoarsePixels(), **extractors}
        appearances = {
            name: self._appearances(PhotographFeatures(extractor, config, material))
            for name, extractor in self.extractors.items()
        }
        identities = {name: extractor.identity for name, extractor in self.extractors.items()}
        self.reference = MemorisationReference(appearances, identities, config.memorisation, config.evaluation.seed)

    def report(self, images: np.ndarray, membership: Estimate | None) -> MemorisationReport:
        """Judge pictures uint8 [M, H, W, 3]."""
        pictures = torch.from_numpy(images)
        return self.reference.report({name: each(pictures) for name, each in self.extractors.items()}, membership)

    def suspects(self, images: np.ndarray) -> tuple[Suspect, ...]:
        """Each of the pictures uint8 [M, H, W, 3] beside its nearest photograph, in their order."""
        pictures = torch.from_numpy(images)
        return self.reference.suspects({name: each(pictures) for name, each in self.extractors.items()})

    def write_pairs(self, folder: Path, report: MemorisationReport, images: np.ndarray) -> Path | None:
        """The likeliest copies beside the photographs they resemble, for a person; None where none are asked for."""
        records = self.material.source.split.train
        suspects = report.suspects[: self.config.memorisation.pairs]
        if not suspects:
            return None

        def photograph(row: int) -> np.ndarray:
            return evaluation_pixels([records[row]], self.config.data)[0].numpy()

        names = [(record.name, record.patient) for record in records]
        return write_closest_pairs(folder, suspects, images, photograph, names)

    def _appearances(self, features: PhotographFeatures) -> TrainingAppearances:
        """Training photographs in every way a copy may show them; queries are rendered as a sampler would."""
        split = self.material.source.split
        restored = features.reconstructions(split.train)
        return TrainingAppearances(
            training=feature_rows(split.train, split.classes, restored),
            held_out=feature_rows(split.held_out, split.classes, features.reconstructions(split.held_out)),
            appearances=(
                restored,
                features.photographs(split.train),
                features.reconstructions(split.train, mirrored=True),
                features.photographs(split.train, mirrored=True),
            ),
        )


def membership(
    config: RunConfig, material: Material, sampler: Sampler, between_batches: Callable[[], None]
) -> Estimate:
    """AUC of telling training from held-out photographs by how much the subject's loss fell below the base's."""
    split = material.source.split
    sides = [
        _member_losses(
            [records[row] for row in grid_rows(len(records), config.memorisation.membership_images).tolist()],
            config,
            material,
            sampler,
            between_batches,
        )
        for records in (split.train, split.held_out)
    ]
    return membership_auc(*sides)


def _member_losses(
    records: Sequence[Record],
    config: RunConfig,
    material: Material,
    sampler: Sampler,
    between_batches: Callable[[], None],
) -> MemberLosses:
    latents = encode_evaluation_latents(
        records, config.data, material.cache, material.encoder, material.source.split.classes
    )
    evaluation, factor = config.evaluation, float(material.pipe.vae.config.scaling_factor)
    grid = ValidationGrid.build(latents, factor, len(records), evaluation.validation_timesteps, evaluation.seed)
    now, base = (
        validation_losses(
            each.unet,
            Objective(dict(each.pipe.scheduler.config), config.loss, None),
            each.conditioner,
            grid,
            Ranks(between_batches),
        )
        for each in (sampler, base_sampler(config, material))
    )
    return MemberLosses(now, base, tuple(record.patient for record in records))
