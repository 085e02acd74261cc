"""What generated images are measured against: features of real photographs, cached, for each extractor at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dfu_mlflow.base.autoencoder import autoencode
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.data import dataset_digest, evaluation_pixels
from dfu_mlflow.data.views import plan_evaluation_view
from dfu_mlflow.evaluator import Panel
from dfu_mlflow.metrics.extractors.base import Extractor
from dfu_mlflow.metrics.extractors.efficientnet import efficientnet_lite0
from dfu_mlflow.metrics.extractors.files import Unavailable
from dfu_mlflow.metrics.extractors.inception import inception
from dfu_mlflow.metrics.matching import FeatureRows
from dfu_mlflow.metrics.reference import RealFeatures, Reference, ReferenceSettings
from dfu_mlflow.preparation import Material
from dfu_mlflow.types import Record

BATCH_PIXELS = 64 * 64 * 64
"""Pixels decoded at a time: 64 pictures of 64 px, one of 512 px and above."""


@dataclass(frozen=True)
class Panels:
    """The extractors that can be used, and why others cannot.

    Attributes:
        panels: one an extractor; the first is the embedded one.
        notes: metric -> why it is not computed.
    """

    panels: tuple[Panel, ...]
    notes: dict[str, str]


def build_panels(config: RunConfig, material: Material) -> Panels:
    """Extract (or find in the cache) the features of the real photographs.

    Raises:
        UserError: for an Inception weights file that is none.
    """
    extractor = efficientnet_lite0(config.metrics.extractor_size_px, material.device)
    panels = [_panel(extractor, "fd", config, material)]
    fid = inception(config.metrics.inception_weights, config.metrics.allow_download, material.device)
    if isinstance(fid, Unavailable):
        return Panels(tuple(panels), {"fid": fid.reason})
    return Panels((*panels, _panel(fid, "fid", config, material)), {})


def _panel(extractor: Extractor, frechet_name: str, config: RunConfig, material: Material) -> Panel:
    split = material.source.split
    features = _Features(extractor, config, material)
    real = RealFeatures(
        classes=split.classes,
        held_out=_rows(split.held_out, split.classes, features.photographs(split.held_out)),
        training=_rows(split.train, split.classes, features.photographs(split.train)),
        reconstructed_held_out=features.reconstructions(split.held_out),
        reconstructed_training=features.reconstructions(split.train),
    )
    settings = ReferenceSettings(
        extractor=extractor.identity,
        samples=config.evaluation.samples,
        seed=config.evaluation.seed,
        floor_draws=config.metrics.floor_draws,
        data_digest=dataset_digest(split),
        frechet_name=frechet_name,
    )
    return Panel(extractor, Reference(real, settings))


class _Features:
    """Cached features of photographs as they are and as the autoencoder gives them back."""

    def __init__(self, extractor: Extractor, config: RunConfig, material: Material) -> None:
        self.extractor = extractor
        self.data = config.data
        self.material = material

    def photographs(self, records: Sequence[Record]) -> torch.Tensor:
        """float64 [N, D]."""
        return self._cached(records, f"features:{self.extractor.identity}", restore=False)

    def reconstructions(self, records: Sequence[Record]) -> torch.Tensor:
        """float64 [N, D]."""
        namespace = f"features:{self.extractor.identity}:{self.material.encoder.identity}"
        return self._cached(records, namespace, restore=True)

    def _cached(self, records: Sequence[Record], namespace: str, restore: bool) -> torch.Tensor:
        def compute(positions: list[int]) -> torch.Tensor:
            pixels = evaluation_pixels([records[position] for position in positions], self.data)
            return self.extractor(autoencode(self.material.pipe.vae, pixels) if restore else pixels)

        keys = [plan_evaluation_view(record, self.data).key(record) for record in records]
        batch = max(1, BATCH_PIXELS // self.data.resolution_px**2)
        return self.material.cache.rows(namespace, keys, compute, batch)


def _rows(records: Sequence[Record], classes: tuple[str, ...], features: torch.Tensor) -> FeatureRows:
    ids = torch.tensor([classes.index(record.label) for record in records])
    return FeatureRows(features, ids, tuple(record.patient for record in records))
