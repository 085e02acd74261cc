"""The real side of every evaluation of a run: built once, asked after each epoch.

Every distance compares `size` held-out with `size` generated pictures in the held-out set's class proportions, because
the Frechet distance depends on the number of pictures; floors use the same size and proportions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from dfu_mlflow import runtime
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.catalogue import METRICS
from dfu_mlflow.metrics.classifier import class_accuracy, fit_classifier
from dfu_mlflow.metrics.comparison import (
    MIN_VERDICT_PICTURES,
    Comparison,
    compare,
    progress,
    require_comparable,
)
from dfu_mlflow.metrics.floors import floors
from dfu_mlflow.metrics.matching import FeatureRows, matched_rows, proportional_counts, row_order
from dfu_mlflow.metrics.metric import Better, Metric
from dfu_mlflow.metrics.pair import Pair, generated_rows
from dfu_mlflow.types import Estimate, EvalReport

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

PROTOCOL = 2
"""Raised by whoever changes what a figure means. 2: a floor's range allows for draws that overlap."""
MIN_IMAGES = 10
"""Fewer pictures on a side say nothing: the figure is left out, with a note."""


@dataclass(frozen=True)
class RealFeatures:
    """Features of real photographs.

    Attributes:
        classes: labels; a class id is a position here.
        held_out: photographs of patients the model never saw.
        training: photographs of training patients: the floor. None leaves it out.
        reconstructed_held_out: float64 [N, D], the held-out rows after the autoencoder: its floor. None leaves it out.
        reconstructed_training: float64 [T, D], the training rows after the autoencoder: the classifier's lessons.
    """

    classes: tuple[str, ...]
    held_out: FeatureRows
    training: FeatureRows | None = None
    reconstructed_held_out: torch.Tensor | None = None
    reconstructed_training: torch.Tensor | None = None


@dataclass(frozen=True)
class ReferenceSettings:
    """What figures depend on besides the features.

    Attributes:
        extractor: the extractor's identity.
        samples: pictures an evaluation generates; at most as many as are held out (or in training) are compared.
        seed: of the samples, of the choice of rows and of the floors.
        floor_draws: random sets of training patients in a floor.
        data_digest: which photographs these are, hexadecimal.
        metrics: what is computed, by name in `catalogue.METRICS`.
        names: figure -> the name it is reported under, where that is another: `fd` is `fid` for Inception features.
        judge: whether a classifier on these features says which class a picture shows.
        drawn: how the pictures are drawn, where that is not how their model draws.
    """

    extractor: str
    samples: int
    seed: int = 0
    floor_draws: int = 20
    data_digest: str = ""
    metrics: tuple[str, ...] = ("frechet", "kernel")
    names: Mapping[str, str] = field(default_factory=dict)
    judge: bool = True
    drawn: str = ""


class Reference:
    """Real photographs as features, their floors and the class judge; `report` measures generated pictures by them.

    Attributes:
        size: pictures compared on each side.
        counts: class id -> how many of them.
        identity: what the figures depend on, readable, with a digest at its end.
        floors: metric name -> estimate, e.g. `fd_floor`, `kid_autoencoder_floor`, `class_accuracy_reconstructed`.
        notes: what could not be computed, and why.
    """

    def __init__(self, real: RealFeatures, settings: ReferenceSettings) -> None:
        self.real, self.settings = real, settings
        training = 0 if real.training is None else len(real.training)
        limits = [settings.samples, len(real.held_out), *([training] if training >= MIN_IMAGES else [])]
        self.size = min(limits)
        self.counts = proportional_counts(real.held_out.class_ids, self.size)
        order = row_order(len(real.held_out), runtime.generator(settings.seed, "metrics/held-out"))
        self._rows = matched_rows(real.held_out.class_ids, self.counts, order)
        self._chosen = real.held_out.take(self._rows)
        self._metrics = [METRICS[name] for name in settings.metrics]
        self.identity = _identity(settings, self.size, len(real.held_out))
        self.floors: dict[str, Estimate] = {}
        self.notes: dict[str, str] = {}
        if self.size >= MIN_IMAGES:
            self._add_floor()
            self._add_autoencoder_floor()
        self._judge = self._fit_judge()

    def generation_plan(self, samples: int | None = None) -> dict[str, int]:
        """How many pictures of each class to generate so that nothing is thrown away: label -> count.

        At most `size` are used; `samples` None takes the settings'.
        """
        wanted = min(self.size, self.settings.samples if samples is None else samples)
        counts = proportional_counts(self.real.held_out.class_ids, wanted)
        return {label: counts.get(index, 0) for index, label in enumerate(self.real.classes)}

    def report(
        self, features: torch.Tensor, class_ids: torch.Tensor, base: EvalReport | None = None, weights: str = "live"
    ) -> EvalReport:
        """Measure generated pictures.

        Args:
            features: float64 [M, D]. More than `size` are reduced to it by seed; with fewer, everything is measured at
                M a side, which changes the identity.
            class_ids: int64 [M], the classes asked for; -1 where unknown.
            base: the untouched base's report, for the progress.
            weights: which weights drew the pictures, `live` or `ema`.

        Raises:
            UserError: for a `base` of another identity, or features that cannot be compared.
        """
        if MIN_IMAGES <= len(features) < self.size:
            return self.resized(len(features)).report(features, class_ids, base, weights)
        report = EvalReport({}, self.identity, weights, dict(self.notes))
        if min(len(features), self.size) < MIN_IMAGES:
            reason = f"{min(len(features), len(self._chosen))} pictures to compare, at least {MIN_IMAGES} are needed"
            report.notes.update(dict.fromkeys(self._figures(), reason))
            return report
        if base is not None:
            require_comparable(base, report)
        rows = self._generated_rows(class_ids, report)
        self._add_figures(report, Pair(self._chosen, generated_rows(features[rows], class_ids[rows])))
        report.values.update(self.floors)
        self._add_progress(report, base)
        self._add_class_accuracy(report, features, class_ids)
        return report

    def compare(self, first: torch.Tensor, second: torch.Tensor, class_ids: torch.Tensor) -> dict[str, Comparison]:
        """Say by each figure whether `first` is better than `second`, generated from the same seeds, row for row.

        Differences are much narrower than those of two reports: what both share (photographs, seeds) cancels. Figures
        that are given by class stand there once more as `LABEL/figure`, for classes with `MIN_IMAGES` on each side.

        Raises:
            UserError: when there are fewer rows than are compared.
        """
        if not len(first) == len(second) == len(class_ids) or len(first) < self.size:
            raise UserError(f"{len(first)} and {len(second)} generated rows: two equal sets of {self.size} are needed")
        rows = self._generated_rows(class_ids, None)
        pairs = [Pair(self._chosen, generated_rows(each[rows], class_ids[rows])) for each in (first, second)]
        found: dict[str, Comparison] = {}
        for metric in self._metrics:
            found |= self._compared(metric, tuple(metric.figures), pairs, "")
        if len(self.real.classes) > 1:
            for index, label in enumerate(self.real.classes):
                parts = [pair.of_class(index) for pair in pairs]
                for metric in (metric for metric in self._metrics if min(parts[0].sizes) >= MIN_IMAGES):
                    found |= self._compared(metric, metric.by_class, parts, f"{label}/")
        return found

    def _compared(
        self, metric: Metric, figures: tuple[str, ...], pairs: Sequence[Pair], prefix: str
    ) -> dict[str, Comparison]:
        if not figures:
            return {}
        one, other = (metric.replicates(pair) for pair in pairs)
        names = {figure: f"{prefix}{self._name(figure)}" for figure in figures if metric.figures[figure] != "neither"}
        return {
            name: compare(name, (one[figure] - other[figure]).estimate(), metric.figures[figure], min(pairs[0].sizes))
            for figure, name in names.items()
        }

    def _name(self, figure: str) -> str:
        return self.settings.names.get(figure, figure)

    def _figures(self) -> list[str]:
        return [self._name(figure) for metric in self._metrics for figure in metric.figures]

    def resized(self, samples: int, drawn: str = "") -> Reference:
        """The same photographs for another number of pictures, drawn otherwise if `drawn` says how."""
        return Reference(self.real, replace(self.settings, samples=samples, drawn=drawn or self.settings.drawn))

    def _add_floor(self) -> None:
        names = {figure: f"{self._name(figure)}_floor" for metric in self._metrics for figure in metric.floor}
        if self.real.training is None or len(self.real.training) < self.size:
            reason = f"fewer than {MIN_IMAGES} training photographs are at hand"
            self.notes.update(dict.fromkeys(names.values(), reason))
            return
        draws, seed = self.settings.floor_draws, self.settings.seed
        found = floors(self._metrics, self._chosen, self.real.training, self.counts, draws, seed)
        self.floors.update({names[figure]: estimate for figure, estimate in found.items()})

    def _add_autoencoder_floor(self) -> None:
        """Held-out photographs against their own reconstructions: no sampler of this autoencoder gets below."""
        restored = self.real.reconstructed_held_out
        for metric in self._metrics:
            if metric.paired_values is None:
                continue
            names = {figure: f"{self._name(figure)}_autoencoder_floor" for figure in metric.figures}
            if restored is None:
                reason = "no reconstructions of held-out photographs are at hand"
                self.notes.update(dict.fromkeys(names.values(), reason))
                continue
            pair = Pair(self._chosen, generated_rows(restored[self._rows], self._chosen.class_ids))
            for figure, value in metric.paired_values(pair).items():
                self.floors[names[figure]] = Estimate(value)

    def _fit_judge(self) -> Pipeline | None:
        training, features = self.real.training, self.real.reconstructed_training
        if not self.settings.judge:
            return None
        if training is None or features is None or len(torch.unique(training.class_ids)) < 2:
            self.notes["class_accuracy"] = "needs reconstructed training photographs of at least two classes"
            return None
        judge = fit_classifier(features, training.class_ids)
        if self.real.reconstructed_held_out is not None and len(self.real.held_out):
            self.floors["class_accuracy_reconstructed"] = class_accuracy(
                judge, self.real.reconstructed_held_out, self.real.held_out.class_ids
            )
        return judge

    def _generated_rows(self, class_ids: torch.Tensor, report: EvalReport | None) -> torch.Tensor:
        order = row_order(len(class_ids), runtime.generator(self.settings.seed, "metrics/generated"))
        rows = matched_rows(class_ids, self.counts, order)
        found = {int(c): int((class_ids[rows] == c).sum()) for c in torch.unique(class_ids[rows])}
        if report is not None and found != {c: count for c, count in self.counts.items() if count}:
            report.notes["class_proportions"] = (
                f"generated pictures by class id {found} are not in the held-out proportions {self.counts}"
            )
        return rows

    def _add_figures(self, report: EvalReport, pair: Pair) -> None:
        for metric in self._metrics:
            for figure, replicates in metric.replicates(pair).items():
                _put(report, self._name(figure), replicates.estimate())
        if len(set(self._chosen.patients)) < 3:
            report.notes["intervals"] = "fewer than 3 held-out patients: no intervals"
        if self.size < MIN_VERDICT_PICTURES:
            few = f"{self.size} pictures on each side are fewer than {MIN_VERDICT_PICTURES}"
            report.notes["verdict"] = f"{few}: intervals, but no verdict"
        if len(self.real.classes) > 1:
            for index, label in enumerate(self.real.classes):
                self._add_class_figures(report, label, pair.of_class(index))

    def _add_class_figures(self, report: EvalReport, label: str, part: Pair) -> None:
        for metric in (metric for metric in self._metrics if metric.by_class):
            names = {figure: f"{label}/{self._name(figure)}" for figure in metric.by_class}
            if min(part.sizes) < MIN_IMAGES:
                reason = f"{min(part.sizes)} pictures to compare, at least {MIN_IMAGES} are needed"
                report.notes.update(dict.fromkeys(names.values(), reason))
                continue
            found = metric.replicates(part)
            for figure, name in names.items():
                _put(report, name, found[figure].estimate())

    def _add_progress(self, report: EvalReport, base: EvalReport | None) -> None:
        for metric in self._metrics:
            for figure in metric.headlines:
                self._add_progress_of(report, base, self._name(figure), metric.figures[figure])

    @staticmethod
    def _add_progress_of(report: EvalReport, base: EvalReport | None, name: str, better: Better) -> None:
        floor_names = (f"{name}_floor", f"{name}_autoencoder_floor")
        known = [report.values[key].value for key in floor_names if key in report.values]
        if base is None or name not in base.values or not known:
            report.notes[f"{name}_progress"] = "needs the untouched base's report" if known else "needs a floor"
            return
        floor = max(known) if better == "smaller" else min(known)
        try:
            report.values[f"{name}_progress"] = progress(base.values[name], report.values[name], floor, better)
        except ValueError as error:
            report.notes[f"{name}_progress"] = str(error)

    def _add_class_accuracy(self, report: EvalReport, features: torch.Tensor, class_ids: torch.Tensor) -> None:
        known = class_ids >= 0
        if self._judge is not None and bool(known.any()):
            report.values["class_accuracy"] = class_accuracy(self._judge, features[known], class_ids[known])
        elif self._judge is not None:
            report.notes["class_accuracy"] = "the classes of the generated pictures are not known"


def _put(report: EvalReport, name: str, estimate: Estimate) -> None:
    """Report a figure, or why there is none."""
    if math.isfinite(estimate.value):
        report.values[name] = estimate
    else:
        report.notes[name] = "not defined for these pictures: too few patients or pictures of a class"


def _identity(settings: ReferenceSettings, size: int, held_out: int) -> str:
    text = (
        f"{settings.extractor}; {size} generated, {size} of {held_out} real; seed {settings.seed};"
        f" data {settings.data_digest[:12] or 'unnamed'}; {settings.floor_draws} floor draws; protocol {PROTOCOL}"
        f"{settings.drawn and f'; {settings.drawn}'}"
    )
    return f"{text}; {hashlib.sha256(f'{text}{settings.data_digest}'.encode()).hexdigest()[:8]}"
