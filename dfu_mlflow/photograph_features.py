"""Cached features of photographs: as they are, as the autoencoder gives them back, and mirrored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from dfu_mlflow.base.autoencoder import autoencode
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.data import evaluation_pixels
from dfu_mlflow.data.cache import Work
from dfu_mlflow.data.views import plan_evaluation_view
from dfu_mlflow.metrics.matching import FeatureRows
from dfu_mlflow.preparation import Material
from dfu_mlflow.types import Record

MAX_BATCH = 64
READ_PIXELS = 2**24
"""Pixels of pictures whose files are decoded side by side: 64 of 512 px, 16 of 1,024 px."""
RESTORED_PIXELS = 64 * 64 * 64
"""Pixels that the autoencoder is given at a time: 64 pictures of 64 px, one of 512 px and above."""


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
        return self._cached(records, f"features:{self.extractor.identity}", restore=False, mirrored=mirrored)

    def reconstructions(self, records: Sequence[Record], mirrored: bool = False) -> torch.Tensor:
        """float64 [N, D], of the photographs after the autoencoder."""
        namespace = f"features:{self.extractor.identity}:{self.material.encoder.identity}"
        return self._cached(records, namespace, restore=True, mirrored=mirrored)

    def _cached(self, records: Sequence[Record], namespace: str, restore: bool, mirrored: bool) -> torch.Tensor:
        def compute(positions: list[int]) -> torch.Tensor:
            pixels = evaluation_pixels([records[position] for position in positions], self.data)
            if mirrored:
                pixels = pixels.flip(2)
            return self.extractor(self._restored(pixels) if restore else pixels)

        keys = [plan_evaluation_view(record, self.data).key(record) for record in records]
        batch = max(1, min(MAX_BATCH, READ_PIXELS // self.data.resolution_px**2))
        what = "photographs behind the autoencoder" if restore else "photographs"
        work = Work(f"features of {what} by {self.extractor.identity.partition('@')[0]}")
        return self.material.cache.rows(f"{namespace}:mirrored" if mirrored else namespace, keys, compute, batch, work)

    def _restored(self, pixels: torch.Tensor) -> torch.Tensor:
        rows = max(1, RESTORED_PIXELS // self.data.resolution_px**2)
        return torch.cat([autoencode(self.material.pipe.vae, part) for part in pixels.split(rows)])


def feature_rows(records: Sequence[Record], classes: tuple[str, ...], features: torch.Tensor) -> FeatureRows:
    """Features [N, D] with class and patient of each photograph."""
    ids = torch.tensor([classes.index(record.label) for record in records])
    return FeatureRows(features, ids, tuple(record.patient for record in records))
