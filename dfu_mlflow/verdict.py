"""Is a run a success, and which of its epochs is the best?"""

from __future__ import annotations

import re
from collections.abc import Collection

from dfu_mlflow.config.measures import EvaluationConfig, SuccessConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.catalogue import ALWAYS, METRICS, SUFFIXES, figure_names, metrics_of
from dfu_mlflow.validation import BINS

LARGER_IS_BETTER = ("progress", "accuracy", "ssim")
"""Ends of names; figures of the catalogue say it themselves."""
VALIDATION = frozenset(f"val_loss{part}" for part in ("", "_change", *(f"_t{number}" for number in range(BINS))))
"""Losses on held-out photographs, which may choose the best epoch."""


def check_names(evaluation: EvaluationConfig, classes: Collection[str]) -> None:
    """Refuse figures that no epoch is measured by, before one is trained.

    Args:
        classes: labels that may stand before a figure: `I/kid`.

    Raises:
        UserError: naming those that there are.
    """
    pooled, by_class, headlines = {"class_accuracy", "lpips", "ssim"}, set(), set()
    for extractor in ALWAYS:
        metrics = metrics_of(extractor, thorough=False)
        names = figure_names(extractor, metrics)
        for metric in (METRICS[name] for name in metrics):
            pooled |= {names.get(figure, figure) for figure in metric.figures}
            by_class |= {names.get(figure, figure) for figure in metric.by_class}
            headlines |= {f"{names.get(figure, figure)}_progress" for figure in metric.headlines}
    asked = [("best_metric", evaluation.best_metric)]
    asked += [("success.metric", evaluation.success.metric)] if evaluation.success else []
    for flag, name in asked:
        label, _, figure = _without_end(name).rpartition("/")
        known = by_class if label in classes else set() if label else pooled | headlines
        if figure not in (known | VALIDATION if flag == "best_metric" and not label else known):
            raise UserError(
                f"--evaluation.{flag} {name}: unknown; there are {', '.join(sorted(pooled | headlines))}; of one class "
                f"({sorted(classes)[0]}/...) {', '.join(sorted(by_class))}; each with _low or _high for an end of its "
                "interval, and without the eval/ that MLflow shows"
            )


def _without_end(name: str) -> str:
    return re.sub("_(low|high)$", "", name)


def larger_is_better(metric: str) -> bool:
    """Which way a figure is better; its name may have a class and an extractor: `I/coverage`, `recall_dinov2`."""
    name = _without_end(metric).rpartition("/")[2]
    plain = name
    for suffix in SUFFIXES.values():
        plain = plain.removesuffix(suffix)
    ways = {figure: way for one in METRICS.values() for figure, way in one.figures.items()}
    return name.endswith(LARGER_IS_BETTER) or ways.get(plain) == "larger"


def score(figures: dict[str, float], metric: str) -> float | None:
    """A metric as a score, smaller is better; None where it was not computed."""
    if metric not in figures:
        return None
    return -figures[metric] if larger_is_better(metric) else figures[metric]


def success_verdict(success: SuccessConfig | None, series: dict[int, float], trained_epochs: int) -> str:
    """The sentence for the tag `verdict`.

    Args:
        series: epoch -> value of the success metric.
        trained_epochs: epochs done so far.
    """
    if success is None:
        return "no success criterion configured"
    limit = f"below {success.below:g}" if success.below is not None else f"above {success.above:g}"
    rule = f"{success.metric} {limit}" + (f" by epoch {success.by_epoch}" if success.by_epoch else "")
    counted = {
        epoch: value
        for epoch, value in series.items()
        if epoch > 0 and (success.by_epoch is None or epoch <= success.by_epoch)
    }
    if not counted and success.by_epoch is not None and trained_epochs < success.by_epoch:
        return f"open: {rule}; not measured yet"
    if not counted:
        return f"cannot be told: {success.metric} was not computed ({rule})"
    if success.below is not None:
        epoch, value = min(counted.items(), key=lambda item: item[1])
        met = value < success.below
    else:
        epoch, value = max(counted.items(), key=lambda item: item[1])
        met = value > (success.above or 0.0)
    if met:
        return f"met: {rule}; {value:g} at epoch {epoch}"
    if success.by_epoch is not None and trained_epochs < success.by_epoch:
        return f"open: {rule}; best {value:g} at epoch {epoch} of {trained_epochs}"
    return f"missed: {rule}; best {value:g} at epoch {epoch}"
