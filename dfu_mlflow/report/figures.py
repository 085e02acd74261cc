"""Flat figures (`eval/fd`, `eval/fd_low`, `eval/fd_floor` ...) -> tables and plots with interval, floor and ceiling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dfu_mlflow.report.document import Table
from dfu_mlflow.report.plots import Axis, Curve, Level

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Term:
    """What a metric is called and what it says."""

    label: str
    meaning: str


HEADLINES = {
    "fid": Term("FID", "Frechet distance, Inception features; lower is better"),
    "fd": Term("FD", "Frechet distance of features; lower is better"),
    "kid": Term("KID", "kernel distance of features; lower is better"),
}
"""Metrics with floors and progress."""
SUFFIXES = ("_low", "_high", "_floor", "_floor_low", "_floor_high", "_autoencoder_floor", "_progress")


def number(value: float) -> str:
    """Three or four significant digits, no exponent where a person can do without."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def with_interval(figures: Figures, name: str) -> str:
    """`value [low, high]`, or the value alone, or a dash."""
    if name not in figures:
        return "–"
    if f"{name}_low" not in figures:
        return number(figures[name])
    return f"{number(figures[name])} [{number(figures[f'{name}_low'])}, {number(figures[f'{name}_high'])}]"


def headline_table(base: Figures, now: Figures, group: str) -> Table:
    """Each headline beside its ceiling and floors.

    Args:
        base: figures of the untouched base, empty where it was not measured.
        now: figures of the model.
        group: `eval` or `eval_ema`.
    """
    rows = []
    for name, term in HEADLINES.items():
        key = f"{group}/{name}"
        if key in now:
            progress = now.get(f"{key}_progress")
            share = "–" if progress is None else f"{100 * progress:.0f} %"
            if progress is not None and f"{key}_progress_low" in now:
                share += f" [{100 * now[f'{key}_progress_low']:.0f}, {100 * now[f'{key}_progress_high']:.0f}]"
            floor, restored = (with_interval(now, f"{key}_{kind}") for kind in ("floor", "autoencoder_floor"))
            untouched = with_interval(base, f"eval/{name}")
            rows.append((term.label, with_interval(now, key), untouched, floor, restored, share))
    return Table(
        "Brackets are 95 % intervals. Ceiling: the untouched base. Floor: photographs of training patients against "
        "those of held-out patients. Autoencoder's floor: held-out photographs passed through it. Progress: from the "
        "ceiling (0 %) to the larger floor (100 %).",
        ("", "this model", "ceiling", "floor", "autoencoder's floor", "progress"),
        tuple(rows),
    )


def other_table(figures: Figures, group: str) -> Table:
    """Everything else that was measured, by class where it is."""
    names = [name for name in figures if name.startswith(f"{group}/") and not name.endswith(SUFFIXES)]
    shown = [name for name in names if name.removeprefix(f"{group}/") not in HEADLINES]
    rows = tuple((name.removeprefix(f"{group}/"), with_interval(figures, name)) for name in shown)
    return Table("", ("metric", "value"), rows)


def epoch_axes(epochs: Mapping[int, Figures]) -> tuple[Axis, ...]:
    """Headlines and validation loss by epoch; live weights and their average."""
    axes = []
    last = epochs[max(epochs)]
    for name, term in HEADLINES.items():
        curves = [_curve(epochs, f"{group}/{name}", label) for group, label in (("eval", "live"), ("eval_ema", "EMA"))]
        if not curves[0].points:
            continue
        levels = [
            Level(label, last[f"eval/{name}_{kind}"])
            for kind, label in (("floor", "floor"), ("autoencoder_floor", "autoencoder's floor"))
            if f"eval/{name}_{kind}" in last
        ]
        axes.append(Axis(term.label, tuple(curve for curve in curves if curve.points), tuple(levels)))
    axes.append(Axis("validation loss", (_curve(epochs, "val/loss", "live"), _curve(epochs, "val_ema/loss", "EMA"))))
    accuracy = _curve(epochs, "eval/class_accuracy", "live")
    if accuracy.points:
        levels = [Level("reconstructed photographs", last["eval/class_accuracy_reconstructed"])]
        axes.append(Axis("class named right", (accuracy,), tuple(levels)))
    return tuple(axes)


def _curve(epochs: Mapping[int, Figures], name: str, label: str) -> Curve:
    points = {
        float(epoch): (
            figures[name],
            figures.get(f"{name}_low", figures[name]),
            figures.get(f"{name}_high", figures[name]),
        )
        for epoch, figures in epochs.items()
        if name in figures
    }
    return Curve(label, points)
