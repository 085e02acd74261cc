"""A study as one HTML page: words first, then every effect with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dfu_mlflow.report.document import Picture, Report, Section, Table, svg_source
from dfu_mlflow.report.figures import number
from dfu_mlflow.report.plots import Interval, interval_rows
from dfu_mlflow.report.render import render
from tuning.ablation.effects import Effect
from tuning.ablation.runs import Experiment, Journal


def study_page(
    name: str,
    experiment: Experiment,
    journal: Journal,
    said: Sequence[str],
    tables: Mapping[str, tuple[Effect, ...]],
) -> str:
    """The document; opens from disk."""
    sections = [_section(headline, found, experiment) for headline, found in tables.items()]
    levels = tuple(
        (factor.name, factor.low, factor.high, "sampling alone" if factor.sampled else "training")
        for factor in experiment.factors
    )
    design = Section(
        "Design",
        (
            f"{len(experiment.runs())} trainings ({experiment.plan.fraction} factorial, seeds "
            f"{', '.join(map(str, experiment.plan.seeds))}), {len(journal.failures())} without a figure.",
            "An effect is the second level minus the first. Intervals (95 %) come from the scatter of whole trainings, "
            "not of samplings; an effect counts as found when it holds for all effects of its table together (Holm).",
        ),
        tables=(Table("", ("factor", "first level", "second level", "varied by"), levels),),
    )
    return render(Report(f"Study {name}", tuple(said), (*sections, design), (experiment.plan.description,)))


def _section(headline: str, found: Sequence[Effect], experiment: Experiment) -> Section:
    arrows = {factor.name: f"{factor.name}: {factor.low} → {factor.high}" for factor in experiment.factors}
    rows = []
    for effect in found:
        low, high = effect.estimate.low, effect.estimate.high
        if low is not None and high is not None:
            rows.append(Interval(arrows.get(effect.name, effect.name), effect.estimate.value, low, high))
    pictures: tuple[Picture, ...] = ()
    if rows:
        drawn = interval_rows(f"Effects on {headline}", rows, "change of the figure, 95 % interval")
        pictures = (Picture("above the line of zero the figure grows", svg_source(drawn)),)
    words = {True: "yes", False: "no", None: "–"}
    lines = tuple((arrows.get(e.name, e.name), *_figures(e), words[e.found]) for e in found)
    table = Table("", ("effect", "change", "95 % interval", "found"), lines)
    return Section(headline, (), pictures, (table,))


def _figures(effect: Effect) -> tuple[str, str]:
    low, high = effect.estimate.low, effect.estimate.high
    interval = "–" if low is None or high is None else f"[{number(low)}, {number(high)}]"
    return number(effect.estimate.value), interval
