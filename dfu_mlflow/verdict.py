"""Is a run a success, and which of its epochs is the best?"""

from __future__ import annotations

from dfu_mlflow.config.measures import EvaluationConfig, SuccessConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.catalogue import ALWAYS, METRICS, SUFFIXES, figure_names, metrics_of

LARGER_IS_BETTER = ("progress", "accuracy")
"""Ends of names; figures of the catalogue say it themselves."""


def check_names(evaluation: EvaluationConfig) -> None:
    """Refuse figures that no epoch is measured by, before one is trained.

    Raises:
        UserError: naming those that there are.
    """
    known = {"class_accuracy", "lpips", "ssim"}
    for extractor in ALWAYS:
        metrics = metrics_of(extractor, thorough=False)
        names = figure_names(extractor, metrics)
        known |= {names.get(figure, figure) for metric in metrics for figure in METRICS[metric].figures}
    asked = [("best_metric", evaluation.best_metric)]
    asked += [("success.metric", evaluation.success.metric)] if evaluation.success else []
    for flag, name in asked:
        figure = name.rpartition("/")[2].removesuffix("_progress")
        if figure not in known and not (flag == "best_metric" and name.startswith("val_")):
            raise UserError(
                f"--evaluation.{flag} {name}: unknown; there are {', '.join(sorted(known))}, with _progress behind it "
                "the share of the way from the base to the floor"
            )


def larger_is_better(metric: str) -> bool:
    """Which way a figure is better; its name may have a class and an extractor: `I/coverage`, `recall_dinov2`."""
    name = metric.rpartition("/")[2]
    for suffix in SUFFIXES.values():
        name = name.removesuffix(suffix)
    ways = {figure: way for one in METRICS.values() for figure, way in one.figures.items()}
    return metric.endswith(LARGER_IS_BETTER) or ways.get(name) == "larger"


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
