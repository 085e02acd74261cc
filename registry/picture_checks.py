"""Which generated pictures are kept: no copies of training photographs, no colours that no photograph has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dfu_mlflow.config import RunConfig
from dfu_mlflow.data import dataset_digest
from dfu_mlflow.errors import UserError
from dfu_mlflow.memorisation import MemorisationProbe
from dfu_mlflow.metrics.extractors.files import Unavailable
from dfu_mlflow.metrics.extractors.pixels import STATISTICS, colour_statistics
from dfu_mlflow.metrics.extractors.sscd import sscd
from dfu_mlflow.photograph_features import Features, PhotographFeatures
from dfu_mlflow.preparation import Material, prepare, read_source

COPY, COLOUR = "copy", "colour"
FENCE = 3.0
"""Interquartile ranges beyond the quartiles (Tukey's outer fences): 2 in a million of a normal distribution."""
LOWEST_CONTRAST = 0.01
"""Below this a picture is of one colour, whatever the photographs look like: a broken model's are."""
MOST_CLIPPED = 0.9


@dataclass(frozen=True)
class Verdict:
    """What is known about one picture.

    Attributes:
        rejected: `copy`, `colour`, or empty for a picture that is kept.
        similarity: cosine to the nearest training photograph; None where photographs are not at hand.
        features: in which features that is.
        reason: for a person, empty for a picture that is kept.
    """

    rejected: str
    similarity: float | None
    features: str
    reason: str


class Photographs:
    """The training photographs that a version was made of, ready to be compared with.

    Args:
        config: of the version; says where they are.
        known_digest: of the photographs and the split it was trained on, or the start of it; None checks nothing.

    Raises:
        UserError: where they are not at hand, are others, or are too few.
    """

    def __init__(self, config: RunConfig, known_digest: str | None) -> None:
        source = read_source(config)
        self.digest = dataset_digest(source.split)
        if known_digest is not None and not self.digest.startswith(known_digest):
            raise UserError("the photographs at hand are not those, or not the split, that the version was trained on")
        material = prepare(config, source)
        # Pixels, and SSCD where it is at hand. EfficientNet finds next to no copy that pixels overlook (see
        # `metrics.coarse_pixels`) and would make the first picture wait for 4 features of every photograph.
        extractors: dict[str, Features] = {}
        known = sscd(config.metrics.sscd_weights, material.device)
        if not isinstance(known, Unavailable):
            extractors["sscd"] = known
        self.probe = MemorisationProbe(config, material, extractors)
        self.low, self.high = _fences(config, material)


class PictureChecks:
    """Looks at pictures one by one.

    Args:
        photographs: None leaves copies unknown and judges colours by absolute limits alone.
        filters: which of `copy` and `colour` reject; the others are only measured.
    """

    def __init__(self, photographs: Photographs | None, filters: Sequence[str]) -> None:
        self.photographs, self.filters = photographs, tuple(filters)

    def __call__(self, images: np.ndarray) -> list[Verdict]:
        """A verdict for each of the pictures uint8 [N, H, W, 3]; a copy is called that before its colours are."""
        colours = colour_statistics(int(images.shape[1]))(torch.from_numpy(images))
        suspects = self.photographs.probe.suspects(images) if self.photographs else [None] * len(images)
        verdicts = []
        for row, suspect in enumerate(suspects):
            reasons = {COLOUR: self._colour(colours[row])}
            similarity, features = None, ""
            if suspect is not None:
                similarity, features = suspect.similarity, suspect.features
                if suspect.below:
                    reasons[COPY] = f"nearer to a training photograph than chance explains ({features})"
            rejected = next((name for name in (COPY, COLOUR) if name in self.filters and reasons.get(name)), "")
            verdicts.append(Verdict(rejected, similarity, features, reasons.get(rejected, "")))
        return verdicts

    def _colour(self, values: torch.Tensor) -> str:
        """What is wrong with the colour statistics float64 [4]; empty where nothing is."""
        shown = dict(zip(STATISTICS, values.tolist(), strict=True))
        if not shown["contrast"] >= LOWEST_CONTRAST:
            return f"of one colour (contrast {shown['contrast']:.3f})"
        if shown["clipped_share"] > MOST_CLIPPED:
            return f"{shown['clipped_share']:.0%} of its pixels are clipped"
        if self.photographs is None:
            return ""
        limits = zip(STATISTICS, self.photographs.low.tolist(), self.photographs.high.tolist(), strict=True)
        outside = [f"{name} {shown[name]:.3f}" for name, low, high in limits if not low <= shown[name] <= high]
        return f"{', '.join(outside)}: outside the photographs' range" if outside else ""


def _fences(config: RunConfig, material: Material) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest value of each statistic that a picture may have, float64 [4] each, from the training
    photographs as the autoencoder gives them back."""
    statistics = colour_statistics(config.data.resolution_px, material.device)
    features = PhotographFeatures(statistics, config, material)
    values = features.reconstructions(material.source.split.train)
    first, third = values.quantile(0.25, dim=0), values.quantile(0.75, dim=0)
    reach = FENCE * (third - first)
    return torch.minimum(first - reach, values.amin(0)), torch.maximum(third + reach, values.amax(0))
