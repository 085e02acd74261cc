"""The gate: clauses that a challenger must pass. Each is a function of the evidence; the configuration picks them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dfu_mlflow.config.gates import GatesConfig
from dfu_mlflow.config.measures import MemorisationConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.catalogue import ALWAYS, METRICS, figure_names, metrics_of
from dfu_mlflow.metrics.comparison import Comparison
from dfu_mlflow.verdict import larger_is_better, success_verdict
from registry.clean_process import CleanTrial

BLOCKER = "blocker"
FULL = "full"


@dataclass(frozen=True)
class Evidence:
    """Everything that the clauses look at.

    Attributes:
        trial: how it went in a process of its own; None where that was not tried.
        memorisation: thresholds.
        figures: the challenger's, as MLflow shows them (`eval/kid`, `memorisation/membership_auc`).
        compared: figure -> challenger against rival, see `dfu_mlflow.contest.Contest`.
        rival: whom it was compared with.
        labels: the classes.
        first: there is no champion yet, and the rival is the untouched base.
        notes: metric -> why it was not computed.
        findings: of the training run, None where it holds none.
        findings_budget: `cheap` or `full`, words where they are older than the run, None where it is not known.
    """

    trial: CleanTrial | None
    memorisation: MemorisationConfig
    figures: Mapping[str, float] = field(default_factory=dict)
    compared: Mapping[str, Comparison] = field(default_factory=dict)
    rival: str = ""
    labels: Sequence[str] = ()
    first: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)
    findings: Sequence[Mapping[str, Any]] | None = None
    findings_budget: str | None = None


@dataclass(frozen=True)
class Answer:
    """What one clause says.

    Attributes:
        clause: its name, a section of `gates`.
        passed: whether it holds.
        sentence: why, with the figures.
        figures: those it looked at, by name.
    """

    clause: str
    passed: bool
    sentence: str
    figures: Mapping[str, float] = field(default_factory=dict)


Clause = Callable[[Evidence, GatesConfig], Answer]


def loads(evidence: Evidence, gates: GatesConfig) -> Answer:
    """It loads and draws where nothing but the registry is known."""
    trial = evidence.trial
    if trial is None:
        return Answer("loads", False, "the version was not tried in a process of its own")
    return Answer("loads", trial.passed, trial.sentence, {"seconds": trial.seconds})


def quality(evidence: Evidence, gates: GatesConfig) -> Answer:
    """The headline metric is not worse (or better) than the rival's, by the paired interval."""
    name, rule = gates.quality.metric, gates.quality.against_base if evidence.first else gates.quality.against_champion
    found = evidence.compared.get(name)
    if found is None:
        return Answer("quality", False, f"{name} was not compared: {_why(evidence, name)}")
    sentence = f"against {evidence.rival}, {found.sentence}"
    figures = _figures(found)
    if found.outcome == "no verdict":
        return Answer("quality", False, sentence, figures)
    passed = found.outcome == "better" or (rule == "not_worse" and found.outcome != "worse")
    if not passed and found.outcome == "cannot be told apart":
        sentence += "; it must be better"
    if gates.quality.margin is not None and passed:
        passed = _worst_case(name, found) <= gates.quality.margin
        sentence += "" if passed else f"; the interval reaches further than gates.quality.margin {gates.quality.margin}"
    return Answer("quality", passed, sentence, figures)


def classes(evidence: Evidence, gates: GatesConfig) -> Answer:
    """No class is worse than the rival's."""
    found = {name: each for name, each in evidence.compared.items() if name.endswith(f"/{gates.classes.metric}")}
    figures = {f"{name}/{key}": value for name, each in found.items() for key, value in _figures(each).items()}
    if not found and (metric := gates.classes.metric) not in evidence.compared:
        return Answer("classes", False, f"{metric} was not compared: {_why(evidence, metric)}")
    worse = [each.sentence for each in found.values() if each.outcome == "worse"]
    if worse:
        return Answer("classes", False, f"against {evidence.rival}, {'; '.join(worse)}", figures)
    decided = {name.rpartition("/")[0] for name, each in found.items() if each.outcome != "no verdict"}
    undecided, counted = sorted(set(evidence.labels) - decided), len(decided)
    if len(evidence.labels) > 1 and not decided:
        too_few = (
            "too few pictures of each class to compare: raise --evaluation.samples, hold more photographs out, or do "
            "without (--gates.classes.enabled false)"
        )
        return Answer("classes", False, too_few, figures)
    sentence = f"{counted} classes compared by {gates.classes.metric}, none is worse than {evidence.rival}'s"
    return Answer(
        "classes", True, sentence + (f"; too few pictures of {', '.join(undecided)}" * bool(undecided)), figures
    )


def memorisation(evidence: Evidence, gates: GatesConfig) -> Answer:
    """No more copies than chance explains, and no telling whom it was trained on."""
    limits = {
        "copy_excess": ("max_copy_excess", evidence.memorisation.max_copy_excess),
        "membership_auc": ("max_membership_auc", evidence.memorisation.max_membership_auc),
    }
    figures = {
        name.removeprefix("memorisation/"): value
        for name, value in evidence.figures.items()
        if name.startswith("memorisation/") and any(part in name for part in limits)
    }
    shown = {name: value for name, value in figures.items() if not name.endswith(("_low", "_high"))}
    problems = []
    for name, value in shown.items():
        flag, limit = limits[name.rpartition("/")[2]]
        # An area of 1, or too few patients, comes without an interval: then the figure itself decides.
        low = figures.get(f"{name}_low", value)
        if low > limit:
            problems.append(f"{name} is {value:.3g}, at least {low:.3g}; memorisation.{flag} allows {limit:g}")
    if problems:
        return Answer("memorisation", False, "; ".join(problems), figures)
    if not any(name.endswith("copy_excess") for name in shown):
        sentence = f"not measured: {_why(evidence, 'memorisation')}"
        return Answer("memorisation", not gates.memorisation.required, sentence, figures)
    listed = ", ".join(f"{name} {value:.3g}" for name, value in shown.items())
    return Answer("memorisation", True, f"below the thresholds: {listed}", figures)


def findings(evidence: Evidence, gates: GatesConfig) -> Answer:
    """`diagnose` found nothing that blocks."""
    if evidence.findings is None:
        sentence = "the training run holds no findings.json: diagnose was not run on it"
        return Answer("findings", not gates.findings.required, sentence)
    if gates.findings.required and evidence.findings_budget != FULL:
        looked = evidence.findings_budget or "not known to be full"
        sentence = f"a full diagnosis is required, and the run's findings are {looked}: diagnose it with --budget full"
        return Answer("findings", False, sentence)
    blocking = [each for each in evidence.findings if each.get("severity") == BLOCKER]
    counts = {"findings": float(len(evidence.findings)), "blockers": float(len(blocking))}
    if not blocking:
        return Answer("findings", True, f"{len(evidence.findings)} findings, none blocks", counts)
    said = "; ".join(" ".join(str(each.get(key, "")) for key in ("id", "explanation", "fix")) for each in blocking)
    return Answer("findings", False, f"diagnose found what blocks: {' '.join(said.split())}", counts)


def success(evidence: Evidence, gates: GatesConfig) -> Answer:
    """A configured figure is reached."""
    assert gates.success is not None
    name = f"eval/{gates.success.metric}"
    value = evidence.figures.get(name)
    verdict = success_verdict(gates.success, {} if value is None else {1: value}, 1)
    return Answer("success", verdict.startswith("met"), verdict, {} if value is None else {gates.success.metric: value})


def clauses(gates: GatesConfig) -> tuple[Clause, ...]:
    """Those that the configuration asks for, the cheapest first."""
    wanted: tuple[tuple[bool, Clause], ...] = (
        (gates.loads.enabled, loads),
        (gates.findings.enabled, findings),
        (gates.quality.enabled, quality),
        (gates.classes.enabled, classes),
        (gates.memorisation.enabled, memorisation),
        (gates.success is not None, success),
    )
    return tuple(clause for enabled, clause in wanted if enabled)


def check_metrics(gates: GatesConfig) -> None:
    """Refuse a figure that no evaluation gives, before one is made.

    Raises:
        UserError: naming those that can be compared.
    """
    figures: set[str] = set()
    by_class: set[str] = set()
    for extractor in ALWAYS:
        metrics = metrics_of(extractor, thorough=True)
        names = figure_names(extractor, metrics)
        for metric in (METRICS[name] for name in metrics):
            figures |= {names.get(figure, figure) for figure, way in metric.figures.items() if way != "neither"}
            by_class |= {names.get(figure, figure) for figure in metric.by_class}
    asked = (("quality", gates.quality.metric, figures), ("classes", gates.classes.metric, by_class))
    for flag, wanted, known in asked:
        if wanted not in known:
            raise UserError(f"--gates.{flag}.metric {wanted}: give one of {', '.join(sorted(known))}")


def judge(evidence: Evidence, gates: GatesConfig) -> tuple[Answer, ...]:
    """The answer of each clause; all are asked, so that a refusal names everything at once."""
    return tuple(clause(evidence, gates) for clause in clauses(gates))


def _figures(found: Comparison) -> dict[str, float]:
    difference = found.difference
    ends = {"difference": difference.value, "low": difference.low, "high": difference.high}
    return {name: value for name, value in ends.items() if value is not None and math.isfinite(value)}


def _worst_case(name: str, found: Comparison) -> float:
    """How much worse the challenger may be: the interval's far end, positive is worse."""
    low, high = found.difference.low, found.difference.high
    assert low is not None
    assert high is not None
    return -low if larger_is_better(name) else high


def _why(evidence: Evidence, name: str) -> str:
    if name in evidence.notes:
        return evidence.notes[name]
    known = ", ".join(figure for figure in evidence.compared if "/" not in figure)
    return f"known are {known}" if known else "it was not asked for, or there are too few photographs"
