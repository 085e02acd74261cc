"""Flat figures (`eval/fd`, `eval/fd_low`, `eval/fd_floor` ...) -> tables and plots with interval, floor and ceiling."""

from __future__ import annotations

from collections.abc import Mapping

from dfu_mlflow.report.document import Table
from dfu_mlflow.report.plots import Axis, Curve, Level

Figures = Mapping[str, float]


LABELS = {"fid": "FID", "fd": "FD", "kid": "KID", "fd_dinov2": "FD, DINOv2", "kid_dinov2": "KID, DINOv2"}
"""What the best known figures are called; the others go by their names."""
FLOORS = ("_floor", "_autoencoder_floor")
QUICK = "eval_quick"
"""Group of figures of quick evaluations."""
SUFFIXES = ("_low", "_high", *FLOORS, "_progress")


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


def label(name: str) -> str:
    """What a figure is called."""
    return LABELS.get(name, name)


def headlines(figures: Figures, group: str) -> list[str]:
    """Figures that have a floor to be seen beside, without the group's name."""
    names = [key.removeprefix(f"{group}/") for key in figures if key.startswith(f"{group}/")]
    return [name for name in names if any(f"{group}/{name}{kind}" in figures for kind in FLOORS)]


def headline_table(base: Figures, now: Figures, group: str) -> Table:
    """Each headline beside its ceiling and floors.

    Args:
        base: figures of the untouched base, empty where it was not measured.
        now: figures of the model.
        group: `eval` or `eval_ema`.
    """
    rows = []
    for name in headlines(now, group):
        key = f"{group}/{name}"
        floor, restored = (with_interval(now, f"{key}{kind}") for kind in FLOORS)
        untouched = with_interval(base, f"eval/{name}")
        rows.append((label(name), with_interval(now, key), untouched, floor, restored, _share(now, f"{key}_progress")))
    return Table(
        "Brackets are 95 % intervals. Ceiling: the untouched base. Floor: photographs of training patients against "
        "those of held-out patients. Autoencoder's floor: held-out photographs passed through it. Progress: from the "
        "ceiling (0 %) to the floor that is nearer to it (100 %).",
        ("", "this model", "ceiling", "floor", "autoencoder's floor", "progress"),
        tuple(rows),
    )


def other_table(figures: Figures, group: str) -> Table:
    """Everything else that was measured, by class where it is."""
    names = [name for name in figures if name.startswith(f"{group}/") and not name.endswith(SUFFIXES)]
    shown = [name for name in names if name.removeprefix(f"{group}/") not in headlines(figures, group)]
    rows = tuple((name.removeprefix(f"{group}/"), with_interval(figures, name)) for name in shown)
    return Table("", ("metric", "value"), rows)


def with_quick(epochs: Mapping[int, Figures]) -> bool:
    """Were some epochs evaluated on fewer pictures?"""
    return any(name.startswith(f"{QUICK}/") for figures in epochs.values() for name in figures)


def epoch_axes(epochs: Mapping[int, Figures]) -> tuple[Axis, ...]:
    """Headlines and validation loss by epoch; live weights and their average. Quick figures where there are any."""
    axes = []
    last = epochs[max(epochs)]
    live = QUICK if with_quick(epochs) else "eval"
    for name in LABELS:
        groups = ((live, "live"), (f"{live}_ema", "EMA"))
        curves = [_curve(epochs, f"{group}/{name}", called) for group, called in groups]
        if not curves[0].points:
            continue
        levels = [
            Level(called, last[f"{live}/{name}{kind}"])
            for kind, called in zip(FLOORS, ("floor", "autoencoder's floor"), strict=True)
            if f"{live}/{name}{kind}" in last
        ]
        title = f"{label(name)}, quick" if live == QUICK else label(name)
        axes.append(Axis(title, tuple(curve for curve in curves if curve.points), tuple(levels)))
    axes.append(Axis("validation loss", (_curve(epochs, "val/loss", "live"), _curve(epochs, "val_ema/loss", "EMA"))))
    accuracy = _curve(epochs, f"{live}/class_accuracy", "live")
    if accuracy.points:
        levels = [Level("reconstructed photographs", last[f"{live}/class_accuracy_reconstructed"])]
        axes.append(Axis("class named right", (accuracy,), tuple(levels)))
    return tuple(axes)


def _share(figures: Figures, name: str) -> str:
    if name not in figures:
        return "–"
    share = f"{100 * figures[name]:.0f} %"
    if f"{name}_low" not in figures:
        return share
    return f"{share} [{100 * figures[f'{name}_low']:.0f}, {100 * figures[f'{name}_high']:.0f}]"


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
