"""One evaluation: validation losses, sample grids, generated images -> features -> metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dfu_mlflow.bundle_format import Settings
from dfu_mlflow.config.measures import EvaluationConfig
from dfu_mlflow.metrics.extractors.base import Extractor
from dfu_mlflow.metrics.reference import Reference
from dfu_mlflow.objective import Objective
from dfu_mlflow.phases import phase
from dfu_mlflow.preparation import Material
from dfu_mlflow.ranks import Ranks
from dfu_mlflow.runtime import derive_seed
from dfu_mlflow.sampling import Sampler
from dfu_mlflow.types import Estimate, EvalReport
from dfu_mlflow.validation import ValidationGrid, validation_figures, validation_losses

EXTRACTED_AT_ONCE = 32
"""Pictures handed to an extractor: its own batch, so that features do not depend on who extracts."""


@dataclass(frozen=True)
class Panel:
    """An extractor with the real photographs that its features are compared against."""

    extractor: Extractor
    reference: Reference


@dataclass(frozen=True)
class Baseline:
    """The untouched base's figures, which progress and paired changes refer to.

    Attributes:
        reports: one a panel.
        losses: float64 [M, T], of the validation grid.
    """

    reports: tuple[EvalReport, ...]
    losses: torch.Tensor


@dataclass(frozen=True)
class Drawn:
    """Pictures to be measured.

    Attributes:
        images: uint8 [N, H, W, 3].
        class_ids: int64 [N], the classes asked for.
        counted: bool [N], which of them the metrics count; the others fill the sample grids.
    """

    images: np.ndarray
    class_ids: torch.Tensor
    counted: torch.Tensor


@dataclass(frozen=True)
class Measurement:
    """What one evaluation of one set of weights gave.

    Attributes:
        reports: one a panel.
        losses: float64 [M, T], of the validation grid.
        grids: class label -> uint8 [H, K * W, 3], pictures from fixed seeds side by side.
        figures: metric name -> value, with `_low` and `_high` where there is an interval.
        validation: figure name -> value.
    """

    reports: tuple[EvalReport, ...]
    losses: torch.Tensor
    grids: dict[str, np.ndarray]
    figures: dict[str, float]
    validation: dict[str, float]


@dataclass(frozen=True)
class Observation:
    """What one evaluation of one set of weights saw.

    Attributes:
        losses: float64 [M, T], of the validation grid.
        drawn: pictures from the fixed seeds.
        features: float64 [N, D] of the counted ones, one a panel.
    """

    losses: torch.Tensor
    drawn: Drawn
    features: tuple[torch.Tensor, ...]


class Evaluator:
    """Measures the weights that are in the UNet now.

    Args:
        material: base, prompts and held-out latents.
        objective: for the validation loss.
        settings: how pictures are drawn.
        panels: what is measured on them; the first one's counts decide how many are drawn.
        config: how much is measured.
        ranks: who shares the work; their stop request is answered between batches.
        unet: gives the UNet where it is shared with other models; None takes the material's.
    """

    def __init__(
        self,
        material: Material,
        objective: Objective,
        settings: Settings,
        panels: tuple[Panel, ...],
        config: EvaluationConfig,
        ranks: Ranks,
        unet: Callable[[], Any] | None = None,
    ) -> None:
        self.material = material
        self.unet_source = unet
        self.objective = objective
        self.settings = settings
        self.panels = panels
        self.config = config
        self.ranks = ranks
        self.between_batches: Callable[[], None] = ranks.check  # the main rank of a run says there that it lives
        self.grid = ValidationGrid.build(
            material.held_out,
            float(material.pipe.vae.config.scaling_factor),
            config.validation_images,
            config.validation_timesteps,
            config.seed,
        )

    def observe(self, batch_size: int) -> Observation:
        """Look at the weights in the UNet; the ranks share the work, and each gets all of the result."""
        losses, drawn = self.losses(), self.draw(batch_size)
        return Observation(losses, drawn, extract(self.panels, drawn, self.ranks))

    def judge(self, seen: Observation, shown: str, base: Baseline | None) -> Measurement:
        """The figures of what was seen; `shown` says which weights those were, `live` or `ema`."""
        figures = validation_figures(seen.losses, base.losses if base else None, self.grid.timesteps)
        reports = assess(self.panels, seen.drawn, seen.features, base.reports if base else None, shown)
        grids = sample_grids(seen.drawn, self.material.conditioner.classes, self.config.grid_per_class)
        return Measurement(reports, seen.losses, grids, flatten_reports(reports), figures)

    def losses(self) -> torch.Tensor:
        """Validation losses of the weights in the UNet, float64 [M, T]."""
        unet = self.material.pipe.unet if self.unet_source is None else self.unet_source()
        unet.eval()
        return validation_losses(unet, self.objective, self.material.conditioner, self.grid, self.ranks)

    def numbers(self) -> list[int]:
        """Pictures of each class that are measured."""
        plan = self.panels[0].reference.generation_plan(self.config.samples) if self.panels else {}
        return [int(plan.get(label, 0)) for label in self.material.conditioner.classes]

    def draw(self, batch_size: int, settings: Settings | None = None) -> Drawn:
        """Pictures from the same seeds in every epoch; `settings` None takes the evaluator's own."""
        ids, seeds, counted = [], [], []
        for class_id, wanted in enumerate(self.numbers()):
            for number in range(max(wanted, self.config.grid_per_class)):
                ids.append(class_id)
                counted.append(number < wanted)
                seeds.append(derive_seed(self.config.seed, "evaluation", class_id, number))
        class_ids = torch.tensor(ids)
        pipe, conditioner = self.material.pipe, self.material.conditioner
        sampler = Sampler(pipe, conditioner, settings or self.settings, batch_size, self.unet_source)

        def drawn(rows: slice) -> torch.Tensor:
            pictures = sampler.generate(
                class_ids[rows], seeds[rows], between_batches=self.between_batches, progress=progress
            )
            return torch.from_numpy(pictures)

        with phase("sampling for evaluation", -(-len(seeds) // self.ranks.count), "pictures") as progress:
            images = self.ranks.rows(len(seeds), batch_size, drawn, progress.name)
        return Drawn(images.numpy(), class_ids, torch.tensor(counted))


def extract(panels: Sequence[Panel], drawn: Drawn, ranks: Ranks) -> tuple[torch.Tensor, ...]:
    """Features of the counted pictures, float64 [M, D], one a panel; ranks share the pictures out."""
    pictures = torch.from_numpy(drawn.images)[drawn.counted]

    def features(extractor: Extractor) -> torch.Tensor:
        def extracted(rows: slice) -> torch.Tensor:
            found = extractor(pictures[rows])
            progress.advance(len(found) * ranks.count)
            return found

        with phase(f"features of pictures by {extractor.name}", len(pictures), "pictures") as progress:
            return ranks.rows(len(pictures), EXTRACTED_AT_ONCE, extracted, extractor.name)

    return tuple(features(panel.extractor) for panel in panels)


def assess(
    panels: Sequence[Panel],
    drawn: Drawn,
    features: Sequence[torch.Tensor],
    base: Sequence[EvalReport] | None,
    shown: str,
) -> tuple[EvalReport, ...]:
    """Measure pictures by their features, one report a panel; `base` are the untouched base's reports."""
    class_ids = drawn.class_ids[drawn.counted]
    reports = []
    for number, panel in enumerate(panels):
        with phase(f"figures and intervals by {panel.extractor.name}"):
            before = base[number] if base else None
            reports.append(panel.reference.report(features[number], class_ids, before, shown))
    return tuple(reports)


def sample_grids(drawn: Drawn, classes: Sequence[str], count: int) -> dict[str, np.ndarray]:
    """The first `count` pictures of each class in a row: class label -> uint8 [H, K * W, 3]."""
    return {
        label: np.concatenate(list(drawn.images[(drawn.class_ids == class_id).numpy()][:count]), axis=1)
        for class_id, label in enumerate(classes)
    }


def folded(strip: np.ndarray) -> np.ndarray:
    """A row of square pictures uint8 [H, K * H, 3] as a block of rows, as square as K divides without a gap.

    MLflow shows no logged image wider than 256 px: a row of eight would be 32 px high.
    """
    edge, count = strip.shape[0], strip.shape[1] // strip.shape[0]
    columns = next(number for number in range(1, count + 1) if number**2 >= count and count % number == 0)
    pictures = strip.reshape(edge, count, edge, 3).transpose(1, 0, 2, 3)
    rows: np.ndarray = pictures.reshape(count // columns, columns, edge, edge, 3).transpose(0, 2, 1, 3, 4)
    return rows.reshape(count // columns * edge, columns * edge, 3)


FIXED_NAMES = {"ssim_nearest_real": "ssim", "lpips_nearest_real": "lpips"}
"""Names that runs are compared by, beside those that say what the figure is: both are unpaired, best of N."""


def flatten_reports(reports: Sequence[EvalReport]) -> dict[str, float]:
    """The figures of all reports by name, see `flatten`; some values stand under a fixed name as well."""
    figures: dict[str, float] = {}
    for report in reports:
        figures |= flatten(report.values)
    return figures | {fixed: figures[name] for name, fixed in FIXED_NAMES.items() if name in figures}


def flatten(values: Mapping[str, Estimate]) -> dict[str, float]:
    """Name -> value; interval ends get `_low` and `_high`."""
    figures: dict[str, float] = {}
    for name, estimate in values.items():
        figures[name] = estimate.value
        if estimate.low is not None and estimate.high is not None:
            figures[f"{name}_low"], figures[f"{name}_high"] = estimate.low, estimate.high
    return figures
