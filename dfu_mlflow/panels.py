"""What generated images are measured against: features of real photographs, cached, for each extractor at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.data import dataset_digest
from dfu_mlflow.evaluator import Panel
from dfu_mlflow.metrics.catalogue import METRICS, figure_names, metrics_of
from dfu_mlflow.metrics.extractors.base import Extractor, NetworkExtractor
from dfu_mlflow.metrics.extractors.efficientnet import efficientnet_lite0
from dfu_mlflow.metrics.extractors.files import Unavailable
from dfu_mlflow.metrics.extractors.inception import inception
from dfu_mlflow.metrics.extractors.lpips_embedding import lpips_embedding
from dfu_mlflow.metrics.extractors.pixels import colour_statistics, pixel_values
from dfu_mlflow.metrics.extractors.vision_transformers import clip, dinov2
from dfu_mlflow.metrics.reference import RealFeatures, Reference, ReferenceSettings
from dfu_mlflow.phases import phase
from dfu_mlflow.photograph_features import PhotographFeatures, feature_rows
from dfu_mlflow.preparation import Material


@dataclass(frozen=True)
class Panels:
    """The extractors that can be used, and why others cannot.

    Attributes:
        panels: one an extractor; the first is the embedded one unless `metrics.per_epoch` leaves it out.
        notes: metric -> why it is not computed.
    """

    panels: tuple[Panel, ...]
    notes: dict[str, str]


def build_panels(config: RunConfig, material: Material, thorough: bool = False) -> Panels:
    """Extract (or find in the cache) the features of the real photographs.

    Args:
        config: which extractors are used after each epoch, and where weights lie.
        material: photographs, autoencoder, cache and device.
        thorough: use every extractor and every metric, as `evaluate` does, whatever `metrics.per_epoch` says.

    Raises:
        UserError: for a weights file or folder that holds another network.
    """
    builders = _builders(config, material.device)
    wanted = tuple(builders) if thorough else tuple(name for name in builders if name in config.metrics.per_epoch)
    panels: list[Panel] = []
    notes: dict[str, str] = {}
    for name in wanted:
        extractor = builders[name]()
        metrics = metrics_of(name, thorough)
        if isinstance(extractor, Unavailable):
            names = figure_names(name, metrics)
            figures = [figure for metric in metrics for figure in METRICS[metric].figures]
            notes.update({names.get(figure, figure): extractor.reason for figure in figures})
            continue
        samples = panels[0].reference.size if panels else config.evaluation.samples
        settings = ReferenceSettings(
            extractor=extractor.identity,
            samples=samples,
            seed=config.evaluation.seed,
            floor_draws=config.metrics.floor_draws,
            data_digest=dataset_digest(material.source.split),
            metrics=metrics,
            names=figure_names(name, metrics),
            judge=name == "efficientnet_lite0",
        )
        panels.append(_panel(extractor, settings, config, material))
    return Panels(tuple(panels), notes)


def _builders(config: RunConfig, device: torch.device) -> dict[str, Callable[[], NetworkExtractor | Unavailable]]:
    """How each extractor is made, in the order of the panels."""
    metrics, download = config.metrics, config.metrics.allow_download
    return {
        "efficientnet_lite0": lambda: efficientnet_lite0(metrics.extractor_size_px, device),
        "colour": lambda: colour_statistics(config.data.resolution_px, device),
        "pixels": lambda: pixel_values(device),
        "inception": lambda: inception(metrics.inception_weights, download, device),
        "lpips": lambda: lpips_embedding(
            metrics.lpips_weights, metrics.lpips_network, metrics.lpips_size_px, download, device
        ),
        "dinov2": lambda: dinov2(metrics.dino_weights, metrics.dino_model, download, device),
        "clip": lambda: clip(metrics.clip_weights, download, device),
    }


def _panel(extractor: Extractor, settings: ReferenceSettings, config: RunConfig, material: Material) -> Panel:
    """Only what the metrics ask for is extracted: training photographs for floors, reconstructions for theirs."""
    split = material.source.split
    features = PhotographFeatures(extractor, config, material)
    metrics = [METRICS[name] for name in settings.metrics]
    restored = any(metric.paired_values for metric in metrics)
    training = any(metric.floor for metric in metrics) or settings.judge
    real = RealFeatures(
        classes=split.classes,
        held_out=feature_rows(split.held_out, split.classes, features.photographs(split.held_out)),
        training=feature_rows(split.train, split.classes, features.photographs(split.train)) if training else None,
        reconstructed_held_out=features.reconstructions(split.held_out) if restored else None,
        reconstructed_training=features.reconstructions(split.train) if settings.judge else None,
    )
    with phase(f"floors by {extractor.name}"):
        return Panel(extractor, Reference(real, settings))
