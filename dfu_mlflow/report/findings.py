"""Sections of a report on memorisation and utility."""

from __future__ import annotations

from collections.abc import Mapping

from dfu_mlflow.metrics.memorisation import MemorisationReport
from dfu_mlflow.metrics.utility.report import UtilityReport
from dfu_mlflow.report.document import Picture, Section, Table, svg_source
from dfu_mlflow.report.figures import number
from dfu_mlflow.report.plots import Interval, interval_rows
from dfu_mlflow.types import Estimate

GAIN = "gain"


def memorisation_section(report: MemorisationReport, pairs: int) -> Section:
    """Verdict and figures; the `pairs` that were written show patients and stay out of the report."""
    sentences = (
        f"{report.because[:1].upper()}{report.because[1:]}.",
        *(f"{name}: {text}." for name, text in report.notes.items()),
        *(["The closest pairs are in a local folder for a person to look at; they are never logged."] if pairs else []),
        f"Identity: {report.identity}.",
    )
    return Section("Memorisation", sentences, tables=(estimates_table(report.values),))


def utility_section(report: UtilityReport) -> Section:
    """Gains first, as a plot; then all scores."""
    gains = {name: value for name, value in report.values.items() if _is_headline_gain(name)}
    rows = [
        Interval(name, value.value, value.low, value.high)
        for name, value in gains.items()
        if value.low is not None and value.high is not None
    ]
    pictures: tuple[Picture, ...] = ()
    if rows:
        drawn = interval_rows("Gain of the classifier", rows, "difference, 95 % interval by patient")
        caption = "gain: over real pictures drawn again; over real ones alone; over the base's pictures"
        pictures = (Picture(caption, svg_source(drawn)),)
    sentences = tuple(f"{name}: {text}." for name, text in report.notes.items())
    rest = {name: value for name, value in report.values.items() if name not in gains}
    return Section(
        "Utility",
        (*sentences, f"Identity: {report.identity}."),
        pictures,
        (estimates_table(gains), estimates_table(rest)),
    )


def estimates_table(values: Mapping[str, Estimate]) -> Table:
    """Name, value, 95 % interval."""
    rows = []
    for name, value in values.items():
        known = value.low is not None and value.high is not None
        interval = f"[{number(value.low)}, {number(value.high)}]" if known else "–"  # type: ignore[arg-type]
        rows.append((name, number(value.value), interval))
    return Table("", ("figure", "value", "95 % interval"), tuple(rows))


def _is_headline_gain(name: str) -> bool:
    arm, _, score = name.partition("/")
    return GAIN in arm and score in ("kappa", "macro_f1", "accuracy")
