"""Plots as SVG text: readable in print, at any zoom, and without JavaScript.

Matplotlib (23 MiB) is loaded with the first plot: a training draws none before its last step.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("report.mplstyle")
COLOURS = ("#1f5fa8", "#c2571a", "#2e7d4f", "#7b4ba0", "#8a6d1d")


@dataclass(frozen=True)
class Curve:
    """A figure by epoch (or by setting), with its interval where there is one.

    Attributes:
        label: for the legend.
        points: position -> (value, low, high); low and high equal the value where there is no interval.
    """

    label: str
    points: Mapping[float, tuple[float, float, float]]


@dataclass(frozen=True)
class Level:
    """A horizontal line: a floor or a ceiling."""

    label: str
    value: float


@dataclass(frozen=True)
class Axis:
    """One plot of a row.

    Attributes:
        title: over it.
        curves: what moves.
        levels: what stays.
    """

    title: str
    curves: tuple[Curve, ...]
    levels: tuple[Level, ...] = ()


@dataclass(frozen=True)
class Interval:
    """A row of an interval plot."""

    label: str
    value: float
    low: float
    high: float


def curve_row(axes: Sequence[Axis], x_label: str) -> str:
    """Plots side by side, one an axis."""
    with _figure(4.1 * len(axes), 3.1) as figure:
        for number, axis in enumerate(axes):
            _draw(figure.add_subplot(1, len(axes), number + 1), axis, x_label)
        return _svg(figure)


def interval_rows(title: str, rows: Sequence[Interval], zero: str | None = None) -> str:
    """A dot and its 95 % interval a row; `zero` names the line at 0."""
    with _figure(7.5, 0.9 + 0.32 * len(rows)) as figure:
        plot = figure.add_subplot()
        places = range(len(rows))[::-1]
        for place, row in zip(places, rows, strict=True):
            plot.plot([row.low, row.high], [place, place], color=COLOURS[0], linewidth=2.5, solid_capstyle="butt")
            plot.plot([row.value], [place], "o", color=COLOURS[0], markersize=6)
        if zero is not None:
            plot.axvline(0.0, color="#444", linewidth=0.9)
            plot.set_xlabel(zero)
        plot.set_yticks(list(places), [row.label for row in rows])
        plot.set_ylim(-0.6, len(rows) - 0.4)
        plot.set_title(title)
        return _svg(figure)


@contextmanager
def _figure(width_in: float, height_in: float) -> Iterator[Figure]:
    """An empty figure, in this project's style inside the block."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(STYLE):
        yield Figure(figsize=(width_in, height_in), layout="constrained")


def _draw(plot: Axes, axis: Axis, x_label: str) -> None:
    for curve, colour in zip(axis.curves, COLOURS * (len(axis.curves) // len(COLOURS) + 1), strict=False):
        places = sorted(curve.points)
        values, lows, highs = ([curve.points[place][part] for place in places] for part in range(3))
        plot.plot(places, values, marker="o", markersize=4, color=colour, label=curve.label)
        if lows != values or highs != values:
            plot.fill_between(places, lows, highs, color=colour, alpha=0.15, linewidth=0)
    for level, dashes in zip(axis.levels, ("--", ":", "-.", "--"), strict=False):
        plot.axhline(level.value, color="#444", linewidth=1, linestyle=dashes, label=level.label)
    plot.set_title(axis.title)
    plot.set_xlabel(x_label)
    places = sorted({place for curve in axis.curves for place in curve.points})
    if places and all(float(place).is_integer() for place in places) and len(places) <= 12:
        plot.set_xticks(places)
    plot.legend(fontsize=7.5)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
