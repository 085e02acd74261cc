"""One finished training drawn at several guidance scales: no setting of guidance ever costs a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import plotly.graph_objects as go
from safetensors.torch import load_file

from dfu_mlflow.ema import copy_into
from dfu_mlflow.evaluator import assess, extract, flatten_reports
from dfu_mlflow.ranks import Ranks
from dfu_mlflow.training_run import TrainingRun
from dfu_mlflow.verdict import larger_is_better, score


@dataclass(frozen=True)
class GuidancePoint:
    """Figures at one guidance scale.

    Attributes:
        guidance: the scale.
        figures: metric name -> value, with `_low` and `_high` where there is an interval.
    """

    guidance: float
    figures: dict[str, float]

    def with_interval(self, metric: str) -> tuple[float, float | None, float | None]:
        """A figure and the ends of its interval."""
        return self.figures[metric], self.figures.get(f"{metric}_low"), self.figures.get(f"{metric}_high")


def sweep(run: TrainingRun, bundle: Path, shown: str, guidance: Sequence[float]) -> list[GuidancePoint]:
    """Measure the bundle's weights at each guidance scale, on the seeds that every evaluation draws from.

    The weights are left in the run's UNet.
    """
    copy_into(run.parts.weights, load_file(bundle / "weights.safetensors"))
    run.parts.unet.eval()
    base, panels = run.history.baseline(), run.panels.panels
    points = []
    for scale in guidance:
        run.ranks.check()
        drawn = run.evaluator.draw(run.config.sampling.batch_size, replace(run.settings, guidance_scale=scale))
        reports = assess(panels, drawn, extract(panels, drawn, Ranks()), base.reports if base else None, shown)
        points.append(GuidancePoint(scale, flatten_reports(reports)))
    return points


def best_point(points: Sequence[GuidancePoint], metric: str) -> GuidancePoint:
    """The best by a metric; of equals the lowest guidance."""

    def badness(point: GuidancePoint) -> tuple[float, float]:
        value = score(point.figures, metric)
        assert value is not None  # training had it in every epoch
        return value, point.guidance

    return min(points, key=badness)


def curve_page(curves: Mapping[str, Sequence[GuidancePoint]], metric: str) -> str:
    """Interactive page of a metric against guidance, one curve a name; opens offline."""
    figure = go.Figure()
    for name, points in curves.items():
        values = [point.with_interval(metric) for point in points]
        above = [0.0 if high is None else high - value for value, _, high in values]
        below = [0.0 if low is None else value - low for value, low, _ in values]
        figure.add_trace(
            go.Scatter(
                x=[point.guidance for point in points],
                y=[value for value, _, _ in values],
                error_y={"type": "data", "symmetric": False, "array": above, "arrayminus": below},
                name=name,
            )
        )
    better = "larger" if larger_is_better(metric) else "smaller"
    figure.update_layout(
        title="Each finished training at its own guidance",
        xaxis_title="guidance scale",
        yaxis_title=f"{metric} ({better} is better), 95 % interval",
    )
    return str(figure.to_html(include_plotlyjs=True, full_html=True))
