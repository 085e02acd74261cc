"""The study as interactive pages that open offline: each carries plotly itself (4.5 MB)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import optuna
import optuna.visualization as drawn
import plotly.graph_objects as go
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tuning.guidance import GuidancePoint, curve_page

MIN_TRIALS = 2


def pages(study: optuna.Study, names: tuple[str, ...]) -> dict[str, str]:
    """File name -> HTML; what cannot be drawn from so few trials is left out.

    Args:
        names: the objectives.
    """
    found: dict[str, str] = {}
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < MIN_TRIALS:
        return found
    for number, name in enumerate(names):
        suffix = "" if len(names) == 1 else f"_{name}"
        target = _value(number)
        found[f"history{suffix}.html"] = _page(drawn.plot_optimization_history(study, target=target, target_name=name))
        found[f"parallel_coordinate{suffix}.html"] = _page(
            drawn.plot_parallel_coordinate(study, target=target, target_name=name)
        )
        shares = importances(study, number)
        if shares:
            bars = go.Figure(go.Bar(x=list(shares.values())[::-1], y=list(shares)[::-1], orientation="h"))
            bars.update_layout(title=f"What {name} depends on", xaxis_title="importance (PED-ANOVA)")
            found[f"importances{suffix}.html"] = _page(bars)
    if len(names) > 1:
        found["pareto_front.html"] = _page(
            drawn.plot_pareto_front(
                study, targets=lambda trial: trial.values[: min(3, len(names))], target_names=list(names[:3])
            )
        )
    curves = guidance_curves(study, names[0])
    if curves:
        found["guidance_curve.html"] = curve_page(curves, names[0])
    return found


def importances(study: optuna.Study, objective: int) -> dict[str, float]:
    """Setting -> share of the variation between good trials and all (PED-ANOVA); empty where it cannot be told.

    Settings that only some trials have (`when`) are not judged.
    """
    sign = -1.0 if study.directions[objective] == StudyDirection.MAXIMIZE else 1.0
    value = _value(objective)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on which way is better, which the sign says, and few trials
            return dict(optuna.importance.get_param_importances(study, target=lambda trial: sign * value(trial)))
    except (RuntimeError, ValueError):  # too few trials, or all of one value
        return {}


def guidance_curves(study: optuna.Study, metric: str) -> dict[str, list[GuidancePoint]]:
    """Trial -> its sweep, of trials that have one."""
    return {
        f"trial {trial.number}": [_point(entry, metric) for entry in trial.user_attrs["curve"]]
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if "curve" in trial.user_attrs
    }


def _point(entry: list[Any], metric: str) -> GuidancePoint:
    guidance, value, low, high = entry
    ends = {} if low is None else {f"{metric}_low": low, f"{metric}_high": high}
    return GuidancePoint(guidance, {metric: value, **ends})


def _value(number: int) -> Callable[[FrozenTrial], float]:
    return lambda trial: float(trial.values[number])


def _page(figure: Any) -> str:
    return str(figure.to_html(include_plotlyjs=True, full_html=True))
