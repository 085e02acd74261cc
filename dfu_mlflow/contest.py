"""Challenger against champion inside one evaluation: one protocol, pictures from the same seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.data import dataset_digest
from dfu_mlflow.evaluation_run import (
    HEADLINES,
    SUBJECT_STEP,
    Evaluation,
    EvaluationResult,
    Origin,
    run_evaluation,
)
from dfu_mlflow.metrics.comparison import Comparison
from dfu_mlflow.preparation import Material
from dfu_mlflow.sightings import Sighting, check_subject
from dfu_mlflow.subject import Subject

CHAMPION, BASE = "the champion", "the untouched base"

Open = Callable[[RunConfig, Material], Subject]


@dataclass(frozen=True)
class Contender:
    """One side of a contest.

    Attributes:
        origin: where it comes from.
        open: opens its sampler.
    """

    origin: Origin
    open: Open


@dataclass(frozen=True)
class Contest:
    """What an evaluation of a challenger beside a champion gave.

    Attributes:
        result: the challenger's evaluation.
        rival: whom it was compared with: the champion, or the untouched base while there is none.
        labels: the classes.
        compared: figure -> challenger against rival on equal seeds; `LABEL/figure` for each class.
        rival_figures: the champion's figures; empty for the base.
        protocol: digest of everything that figures depend on besides the models.
        notes: metric -> why it was not computed, and what must be known to read the comparison.
    """

    result: EvaluationResult
    rival: str
    labels: tuple[str, ...]
    compared: Mapping[str, Comparison]
    rival_figures: Mapping[str, float]
    protocol: str
    notes: Mapping[str, str]


def run_contest(config: RunConfig, challenger: Contender, champion: Contender | None) -> Contest:
    """Evaluate the challenger, and the champion by the same panels, photographs, seeds and precision.

    Args:
        config: photographs, base, metrics.
        champion: None compares with the untouched base.

    Raises:
        UserError: for input that cannot be worked with.
        Interrupted: after Ctrl-C or SIGTERM.
    """
    ring = _Ring(config, challenger, champion)
    result = run_evaluation(config, challenger.origin, ring.open, ring.meet)
    return Contest(result, ring.rival, ring.labels, ring.compared, ring.rival_figures, ring.protocol, ring.notes)


@dataclass
class _Ring:
    """Both contenders, and what is found out about them."""

    config: RunConfig
    challenger: Contender
    champion: Contender | None
    rival: str = BASE
    labels: tuple[str, ...] = ()
    protocol: str = ""
    compared: dict[str, Comparison] = field(default_factory=dict)
    rival_figures: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    opened: Subject | None = None

    def open(self, config: RunConfig, material: Material) -> Subject:
        """Both, before anything is drawn: what is wrong with either is told early."""
        if self.champion is not None:
            self.opened = self.champion.open(config, material)
            check_subject(config, material, self.opened)
        return self.challenger.open(config, material)

    def meet(self, evaluation: Evaluation, base: Sighting, seen: Sighting) -> None:
        """Measure the champion and compare."""
        rival = base if self.opened is None else self._champion(evaluation, self.opened, base)
        self.labels = evaluation.observer.classes
        self.compared = evaluation.paired(seen, rival)
        names = [name for name in HEADLINES if name in self.compared]
        evaluation.said += [f"Against {self.rival}, {self.compared[name].sentence}." for name in names if self.opened]
        self.protocol = protocol_digest(self.config, evaluation.identities())
        self.notes |= evaluation.notes

    def _champion(self, evaluation: Evaluation, subject: Subject, base: Sighting) -> Sighting:
        observer = evaluation.observer
        assert self.champion is not None
        self.rival = f"{CHAMPION} ({self.champion.origin.version or self.champion.origin.source})"
        rival = observer.subject(subject, base)
        self.rival_figures = dict(rival.figures)
        evaluation.tracker.epoch(SUBJECT_STEP, {f"champion/{name}": value for name, value in rival.figures.items()})
        known = self.champion.origin.data_digest
        if known is not None and not dataset_digest(observer.material.source.split).startswith(known):
            self.notes["champion"] = (
                "it was trained on other photographs or another split: what is held out here may flatter it"
            )
        return rival


def protocol_digest(config: RunConfig, identities: list[str]) -> str:
    """What both sides' figures depend on besides the models: 16 hexadecimal digits.

    Args:
        identities: of the panels; they hold extractors, photographs, counts and seeds.
    """
    parts = [*identities, config.memorisation.model_dump_json(), config.train.mixed_precision]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
