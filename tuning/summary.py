"""What a study says in words: its best settings with intervals, and which of them cannot be told apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

SHOWN = 10
SCORED = "scored"
"""Attribute of a trial: how many pairs of epoch and weights its checkpoint was picked from."""


def best_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Complete trials, best first; of a study with several objectives those on the Pareto front, by the first."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        return []
    sign = -1.0 if study.directions[0] == StudyDirection.MAXIMIZE else 1.0
    chosen = complete if len(study.directions) == 1 else study.best_trials
    return sorted(chosen, key=lambda trial: (sign * trial.values[0], trial.number))


def lines(study: optuna.Study, names: tuple[str, ...]) -> list[str]:
    """The best settings, a line each, and what their intervals allow to say."""
    best = best_trials(study)
    counts = {state: len(study.get_trials(deepcopy=False, states=(state,))) for state in TrialState}
    ended = ", ".join(f"{count} {state.name.lower()}" for state, count in counts.items() if count)
    if not best:
        return [f"no trial has a figure ({ended})"]
    kind = "best" if len(names) == 1 else "not beaten in every objective"
    text = [f"{ended}; {kind}:"]
    for trial in best[:SHOWN]:
        figures = ", ".join(_figure(trial, number, name) for number, name in enumerate(names))
        text.append(f"  trial {trial.number}: {figures}; {settings_text(trial)}")
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [*text, told_apart(best, names[0], sum(map(looked_at_in, complete)))]


def looked_at_in(trial: FrozenTrial) -> int:
    """How many figures a trial's own was picked from.

    A training's checkpoint is the best of its epochs and weights, at the guidance that it was trained with; its figure
    is the best of that one's at several guidance scales, of which that guidance is one.
    """
    return int(trial.user_attrs.get(SCORED, 1)) + max(len(trial.user_attrs.get("curve", ())) - 1, 0)


def settings_text(trial: FrozenTrial) -> str:
    """A trial's settings as flags; a training's guidance with them."""
    values: dict[str, Any] = dict(trial.params)
    if "guidance_scale" in trial.user_attrs:
        values["sampling.guidance_scale"] = trial.user_attrs["guidance_scale"]
    return " ".join(f"--{name} {_text(value)}" for name, value in values.items())


def told_apart(best: list[FrozenTrial], name: str, looked_at: int) -> str:
    """Which settings the first one is better than.

    The first one was picked for its figure, out of `looked_at` figures. Intervals that hold for all of these at once
    hold whichever was picked (Bonferroni; Berk et al., Valid post-selection inference, Annals of Statistics 41, 2013),
    so the 95 % intervals are widened to 1 - 0.05 / `looked_at` each, as normal ones, before they are held against each
    other. Not overlapping asks for more than a test of the difference would: what is said holds, some is left unsaid.
    """
    first = best[0]
    if len(best) == 1:
        return f"only trial {first.number} is there to compare"
    wide = {trial.number: _widened(trial, name, looked_at) for trial in best}
    low, high = wide[first.number] or (-math.inf, math.inf)
    if math.isinf(low):
        return f"{name} has no interval here: whether the settings differ cannot be told"
    alike = []
    for trial in best[1:]:
        other = wide[trial.number]
        if other is None or (other[0] <= high and low <= other[1]):
            alike.append(str(trial.number))
    how = f"95 % intervals, widened to hold for all {looked_at} figures it was picked from at once (Bonferroni),"
    if not alike:
        return f"trial {first.number} is better than the others by {name}: the {how} do not overlap"
    rest = "" if len(alike) <= SHOWN else f" and {len(alike) - SHOWN} more"
    return (
        f"trial {first.number} cannot be told apart from trial {', '.join(alike[:SHOWN])}{rest} by {name}: the {how} "
        "overlap (more pictures a trial narrow them: --tune.samples)"
    )


def _widened(trial: FrozenTrial, name: str, figures: int) -> tuple[float, float] | None:
    """The interval of one of so many figures, for all of them to hold together in 95 % of studies."""
    interval = _interval(trial, name)
    if interval is None:
        return None
    normal = NormalDist()
    factor = normal.inv_cdf(1 - 0.025 / figures) / normal.inv_cdf(0.975)
    value = trial.values[0]
    return value - factor * (value - interval[0]), value + factor * (interval[1] - value)


def _interval(trial: FrozenTrial, name: str) -> tuple[float, float] | None:
    intervals: Mapping[str, Any] = trial.user_attrs.get("intervals", {})
    return (float(intervals[name][0]), float(intervals[name][1])) if name in intervals else None


def _figure(trial: FrozenTrial, number: int, name: str) -> str:
    interval = _interval(trial, name)
    ends = "" if interval is None else f" [{interval[0]:.4g}, {interval[1]:.4g}]"
    return f"{name} {trial.values[number]:.4g}{ends}"


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
