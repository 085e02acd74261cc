"""The best checkpoint picked inside the noise."""

from __future__ import annotations

import numpy as np
from scipy import stats

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking

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
    needs = ("eval/kid, eval/fid or eval/fd over at least five evaluations", "its intervals, if logged")
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """Is there a trend, and do intervals tell the best from the others?"""
        metric = str(case.settings.get("evaluation.best_metric", "kid"))
        name = f"eval/{metric}" if f"eval/{metric}" in case.curves else None
        points = [(e, v) for e, v in case.curve(*([name] if name else []), "eval/kid", "eval/fid", "eval/fd") if e > 0]
        if len(points) < FEW:
            raise Lacking(f"{len(points)} evaluations, {FEW} are needed to see noise")
        epochs, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
        best = int(values.argmin())
        residual = values - np.polyval(np.polyfit(epochs, values, 1), epochs)
        scatter = float(residual.std(ddof=2) / abs(values.mean()))
        within = self._within(case, name or "eval/kid", points, best)
        side = "two-sided" if within is None else "less"
        p_value = float(stats.spearmanr(epochs, values, alternative=side).pvalue) if values.std() > 0 else 1.0
        evidence = {
            "evaluations": Figure(float(len(values))),
            "best_epoch": Figure(float(epochs[best])),
            "scatter": Figure(scatter, f"below {SCATTER} of the mean"),
            "trend_p_value": Figure(p_value, f"below {TREND}, or little scatter"),
        }
        if within is not None:
            evidence["others_inside_its_interval"] = Figure(within)
        if scatter < SCATTER or p_value < TREND or (within is not None and within < 0.5):
            return Healthy(evidence)
        return self.found(
            "warning",
            0.8 if within is None else 0.9,
            evidence,
            f"{len(values)} evaluations scatter by {100 * scatter:.0f} % without getting better, and epoch "
            f"{epochs[best]:.0f} was called the best: that is the luckiest draw. Draw more pictures, or choose by the "
            "validation loss.",
            {"evaluation.best_metric": "val_loss"},
        )

    def _within(self, case: Case, name: str, points: list[tuple[int, float]], best: int) -> float | None:
        """Share of the other evaluations that lie inside the best one's interval."""
        high = case.curves.get(f"{name}_high", {}).get(points[best][0])
        if high is None:
            return None
        others = [value for number, (_, value) in enumerate(points) if number != best]
        return sum(value <= high for value in others) / len(others)
