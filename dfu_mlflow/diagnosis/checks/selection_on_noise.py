"""The best checkpoint picked inside the noise."""

from __future__ import annotations

import numpy as np
from scipy import stats

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.verdict import larger_is_better

FEW = 5
"""Evaluations below which there is not much to choose from."""
SCATTER = 0.03
"""Standard deviation around the trend, as a share of the mean, below which the choice costs nothing.

The founding run's 19 distances scattered by 0.09; evaluations of this project draw from equal seeds and scatter less.
"""
TREND = 0.05
"""p-value of Spearman's correlation with the epoch below which there is a trend to follow. Where intervals are logged
only a fall is one: a rise inside the best one's interval makes the first evaluation the luckiest."""


class SelectionOnNoise(Check):
    """Interval of each evaluation against the differences between them."""

    id = "selection_on_noise"
    needs = ("the curve of evaluation.best_metric over at least five evaluations", "its intervals, if logged")
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """Does what chooses get better, and do intervals tell the best from the others?"""
        name = self._chooser(case)
        sign = -1 if larger_is_better(name) else 1  # from here on smaller is better
        points = [(epoch, sign * value) for epoch, value in case.curve(name) if epoch > 0]
        if len(points) < FEW:
            raise Lacking(f"{len(points)} evaluations, {FEW} are needed to see noise")
        epochs, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
        best = int(values.argmin())
        residual = values - np.polyval(np.polyfit(epochs, values, 1), epochs)
        scatter = float(residual.std(ddof=2) / abs(values.mean()))
        ends = case.curves.get(f"{name}_low" if sign < 0 else f"{name}_high", {})
        within = self._within(points, best, sign * ends[points[best][0]] if points[best][0] in ends else None)
        side = "two-sided" if within is None else "less"
        p_value = float(stats.spearmanr(epochs, values, alternative=side).pvalue) if values.std() > 0 else 1.0
        evidence = {
            "evaluations": Figure(float(len(values))),
            "best_epoch": Figure(float(epochs[best])),
            "scatter": Figure(scatter, f"below {SCATTER} of the mean"),
            "trend_p_value": Figure(p_value, f"below {TREND}, or little scatter"),
        }
        if within is not None:
            evidence["others_inside_its_interval"] = Figure(float(within))
        if scatter < SCATTER or p_value < TREND or (within is not None and within < 0.5):
            return Healthy(evidence)
        by_loss = name.startswith("val/")
        return self.found(
            "warning",
            0.8 if within is None else 0.9,
            evidence,
            f"{len(values)} evaluations of {name} scatter by {100 * scatter:.0f} % without getting better: the lowest, "
            f"of epoch {epochs[best]:.0f}, is the luckiest draw. "
            + ("Measure more photographs." if by_loss else "Draw more pictures, or choose by the validation loss."),
            {"evaluation.validation_images": 2 * int(case.settings.get("evaluation.validation_images", 64))}
            if by_loss
            else {"evaluation.best_metric": "val_loss"},
        )

    def _chooser(self, case: Case) -> str:
        """The curve that the best checkpoint is chosen by; where nothing says, a distance that was logged."""
        metric = case.settings.get("evaluation.best_metric")
        if metric is None:
            logged = (name for name in ("eval/kid", "eval/fid", "eval/fd") if case.curves.get(name))
            return next(logged, "eval/kid")
        return f"val/{metric[4:]}" if metric.startswith("val_") else f"eval/{metric}"

    def _within(self, points: list[tuple[int, float]], best: int, high: float | None) -> float | None:
        """Share of the other evaluations that lie inside the best one's interval, which ends at `high`."""
        if high is None:
            return None
        others = [value for number, (_, value) in enumerate(points) if number != best]
        return sum(value <= high for value in others) / len(others)
