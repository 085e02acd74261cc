"""Cached features of photographs: as they are, as the autoencoder gives them back, and mirrored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import torch

from dfu_mlflow.base.autoencoder import restore
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.data import encode_evaluation_latents, evaluation_pixels
from dfu_mlflow.data.cache import Compute, Work
from dfu_mlflow.data.views import plan_evaluation_view
from dfu_mlflow.metrics.matching import FeatureRows
from dfu_mlflow.preparation import Material
from dfu_mlflow.types import Record

MAX_BATCH = 64
READ_PIXELS = 2**24
"""Pixels of pictures whose files are decoded side by side: 64 of 512 px, 16 of 1,024 px."""
RESTORED_PIXELS = 64 * 64 * 64
"""Pixels that the autoencoder is given at a time: 64 pictures of 64 px, one of 512 px and above."""
SHORT = re.compile("[@,]")
"""Where the beginning of an identity ends that is enough for a log."""


class Features(Protocol):
    """What makes features of pictures."""

    @property
    def identity(self) -> str:
        """What they depend on besides the pictures."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, H, W, 3] -> float64 [N, D]."""


class PhotographFeatures:
    """Features of a run's photographs by one extractor; with a warm cache no file is opened.

    Args:
        extractor: makes them.
        config: how photographs are cut.
        material: autoencoder and cache.
    """

    def __init__(self, extractor: Features, config: RunConfig, material: Material) -> None:
        self.extractor = extractor
        self.data = config.data
        self.material = material

    def photographs(self, records: Sequence[Record], mirrored: bool = False) -> torch.Tensor:
        """float64 [N, D]."""

        def compute(positions: list[int]) -> torch.Tensor:
            pixels = evaluation_pixels([records[position] for position in positions], self.data)
            return self.extractor(pixels.flip(2) if mirrored else pixels)

        namespace = f"features:{self.extractor.identity}"
        return self._cached(records, namespace, mirrored, (compute, "photographs"))

    def reconstructions(self, records: Sequence[Record], mirrored: bool = False) -> torch.Tensor:
        """float64 [N, D], of the photographs after the autoencoder: their cached latents decoded."""

        def compute(positions: list[int]) -> torch.Tensor:
            chosen = [records[position] for position in positions]
            return self.extractor(self._restored(chosen, mirrored))

        namespace = f"features:{self.extractor.identity}:{self.material.encoder.identity}"
        return self._cached(records, namespace, mirrored, (compute, "photographs behind the autoencoder"))

    def _cached(
        self, records: Sequence[Record], namespace: str, mirrored: bool, job: tuple[Compute, str]
    ) -> torch.Tensor:
        keys = [plan_evaluation_view(record, self.data).key(record) for record in records]
        batch = max(1, min(MAX_BATCH, READ_PIXELS // self.data.resolution_px**2))
        compute, what = job
        work = Work(f"features of {what} by {SHORT.split(self.extractor.identity)[0]}")
        return self.material.cache.rows(f"{namespace}:mirrored" if mirrored else namespace, keys, compute, batch, work)

    def _restored(self, records: Sequence[Record], mirrored: bool) -> torch.Tensor:
        """Pixels of photographs after the autoencoder, uint8 [N, H, W, 3]."""
        material = self.material
        latents = encode_evaluation_latents(
            records, self.data, material.cache, material.encoder, material.source.split.classes, mirrored
        )
        means = latents.moments[:].chunk(2, dim=1)[0]
        rows = restored_at_once(self.data.resolution_px)
        return torch.cat([restore(material.pipe.vae, part) for part in means.split(rows)])


def restored_at_once(resolution_px: int) -> int:
    """Photographs whose latents are decoded together."""
    return max(1, RESTORED_PIXELS // resolution_px**2)


def feature_rows(records: Sequence[Record], classes: tuple[str, ...], features: torch.Tensor) -> FeatureRows:
    """Features [N, D] with class and patient of each photograph."""
    ids = torch.tensor([classes.index(record.label) for record in records])
    return FeatureRows(features, ids, tuple(record.patient for record in records))
