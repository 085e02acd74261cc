"""Which epochs are evaluated in full, and what the others get: counted in UNet passes, kept within a budget.

A pass is one picture through the UNet once. Training counts three a sample (the backward pass is two), four where it
computes activations again; an evaluation one a picture and solver step, two with guidance, and the validation grid.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dfu_mlflow.batches import steps_per_epoch
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.metrics.matching import divided
from dfu_mlflow.metrics.reference import MIN_IMAGES
from dfu_mlflow.types import Split

FEWEST_PER_CLASS = 12
"""Pictures a class, on average, that a quick evaluation has at least."""
FEWEST_STEPS = 10
"""Solver steps below which pictures are another model's."""
SPACING = (1, 2, 3, 5, 10, 20, 30, 50, 100)
"""Epochs from one quick evaluation to the next."""


@dataclass(frozen=True)
class Quick:
    """A small evaluation.

    Attributes:
        pictures: compared with photographs.
        steps: of the solver.
    """

    pictures: int
    steps: int


@dataclass(frozen=True)
class Protocol:
    """What a run keeps to from its start to its end, however often it is resumed or prolonged.

    Attributes:
        every: epochs from one evaluation to the next, the full ones that there always are aside; None has no others.
        quick: what those are; None makes them full.
    """

    every: int | None
    quick: Quick | None

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Protocol:
        """From a checkpoint's state; runs of versions before there was a budget evaluated in full."""
        known = state.get("evaluation")
        if known is None:
            return cls(int(state["config"]["evaluation"]["every_epochs"]), None)
        return cls(known["every"], None if known["quick"] is None else Quick(**known["quick"]))


@dataclass(frozen=True)
class Workload:
    """What training and evaluation cost.

    Attributes:
        epochs: to train.
        training_passes: of all of them.
        every_epochs: as configured.
        by_epoch: of the success criterion; None without one.
        held_out: class id -> photographs.
        pictures: compared with them in a full evaluation.
        grid_per_class: pictures a class that are drawn in any case.
        steps: of the solver.
        guided: does a solver step take two passes?
        validation_passes: of one set of weights on the validation grid.
        shown: sets of weights that are evaluated: live, and their average.
    """

    epochs: int
    training_passes: int
    every_epochs: int
    by_epoch: int | None
    held_out: Mapping[int, int]
    pictures: int
    grid_per_class: int
    steps: int
    guided: bool
    validation_passes: int
    shown: int

    @classmethod
    def of(cls, config: RunConfig, split: Split) -> Workload:
        """Of a run on these photographs."""
        train, evaluation, classes = config.train, config.evaluation, split.classes
        steps = steps_per_epoch(config, len(split.train) * config.data.views_per_image)
        samples = train.epochs * steps * train.batch_size * train.gradient_accumulation_steps
        compared = [evaluation.samples, len(split.held_out)]
        compared += [len(split.train)] if len(split.train) >= MIN_IMAGES else []
        images = min(evaluation.validation_images, len(split.held_out))
        return cls(
            epochs=train.epochs,
            training_passes=samples * (4 if train.gradient_checkpointing else 3),
            every_epochs=evaluation.every_epochs,
            by_epoch=evaluation.success.by_epoch if evaluation.success else None,
            held_out={
                number: sum(record.label == label for record in split.held_out) for number, label in enumerate(classes)
            },
            pictures=min(compared) if config.metrics.per_epoch else 0,
            grid_per_class=evaluation.grid_per_class,
            steps=config.sampling.num_inference_steps,
            guided=config.sampling.guidance_scale > 1,
            validation_passes=images * evaluation.validation_timesteps,
            shown=2 if config.ema.enabled and evaluation.ema else 1,
        )

    def drawn(self, pictures: int) -> int:
        """Pictures drawn where so many are compared: each class fills its row of samples too."""
        return sum(max(count, self.grid_per_class) for count in divided(self.held_out, pictures).values())

    def sampling_passes(self, pictures: int, steps: int) -> int:
        """Of one set of weights, where so many pictures are compared."""
        return self.drawn(pictures) * steps * (2 if self.guided else 1)

    @property
    def full_passes(self) -> int:
        """A full evaluation of one set of weights."""
        return self.sampling_passes(self.pictures, self.steps) + self.validation_passes

    @property
    def fewest_pictures(self) -> int:
        """That a quick evaluation compares at least."""
        return min(len(self.held_out) * max(self.grid_per_class, FEWEST_PER_CLASS), self.pictures)


@dataclass(frozen=True)
class EvaluationPlan:
    """Which epochs are evaluated how, and what it costs.

    Attributes:
        protocol: what is kept to.
        full_epochs, quick_epochs: in order; epoch 0 is the untouched base. Full ones give the quick figures as well.
        training_passes: of the whole run.
        full_passes: of the full evaluations.
        quick_passes: of the quick ones.
        confirmation_passes: of one more full evaluation, for an epoch that is the best by quick figures.
        pictures: drawn by all of these.
    """

    protocol: Protocol
    full_epochs: tuple[int, ...]
    quick_epochs: tuple[int, ...]
    training_passes: int
    full_passes: int
    quick_passes: int
    confirmation_passes: int
    pictures: int

    @property
    def quick(self) -> Quick | None:
        """The small evaluation, where there is one."""
        return self.protocol.quick

    @property
    def evaluation_passes(self) -> int:
        """Of the whole run."""
        return self.full_passes + self.quick_passes + self.confirmation_passes

    @property
    def share(self) -> float:
        """Of the run's passes that evaluation takes."""
        return self.evaluation_passes / max(1, self.evaluation_passes + self.training_passes)

    def full(self, epoch: int) -> bool:
        """Is this epoch evaluated in full?"""
        return epoch in self.full_epochs

    def due(self, epoch: int) -> bool:
        """Is this epoch evaluated at all?"""
        return epoch in self.full_epochs or epoch in self.quick_epochs

    def in_words(self) -> str:
        """Which epochs are evaluated how."""
        full = f"evaluation in full at epoch {_listed(self.full_epochs)}"
        if self.quick is None:
            return full if self.protocol.every is not None else f"{full}; evaluation.budget has room for no others"
        return (
            f"{full}; quick ones (eval_quick/...) at epoch {_listed(self.quick_epochs)} with {self.quick.pictures} "
            f"pictures of {self.quick.steps} solver steps"
        )


def plan_evaluation(config: RunConfig, split: Split, kept: Protocol | None = None) -> EvaluationPlan:
    """The plan of a run on these photographs; `kept` is the protocol that it began with, where it goes on."""
    work = Workload.of(config, split)
    return lay_out(work, kept) if kept is not None else plan(work, config.evaluation.budget)


def plan(work: Workload, budget: float | None) -> EvaluationPlan:
    """The most telling evaluations whose passes are at most `budget` of training's.

    Where the full ones that there always are leave too little for any others, those get half of the budget.
    """
    everything = lay_out(work, Protocol(work.every_epochs, None))
    allowed = 0 if budget is None else int(budget * work.training_passes)
    if budget is None or everything.evaluation_passes <= allowed:
        return everything
    fewest = lay_out(work, Protocol(None, None))
    for limit in (allowed, fewest.evaluation_passes + work.full_passes + allowed // 2):
        for every, steps in _ladder(work):
            found = _largest(work, every, steps, limit)
            if found is not None:
                return found
    return fewest


def lay_out(work: Workload, protocol: Protocol) -> EvaluationPlan:
    """What a protocol comes to."""
    every, quick = protocol.every, protocol.quick
    between = set() if every is None else set(range(every, work.epochs, every))
    always = {0, work.epochs}
    if protocol != Protocol(work.every_epochs, None) and work.by_epoch is not None and work.by_epoch < work.epochs:
        always.add(work.by_epoch)  # the criterion is asked of full figures
    full = tuple(sorted(always if quick is not None else always | between))
    quick_epochs = tuple(sorted(between - always)) if quick is not None else ()
    full_sets, quick_sets = 1 + work.shown * (len(full) - 1), work.shown * len(quick_epochs)
    confirmed = 0 if quick is None else 1
    quick_passes, pictures = 0, (full_sets + confirmed) * work.drawn(work.pictures)
    if quick is not None:
        draws = quick_sets + (full_sets if quick.steps != work.steps else 0)  # else they are among the full ones
        quick_passes = draws * work.sampling_passes(quick.pictures, quick.steps) + quick_sets * work.validation_passes
        pictures += draws * work.drawn(quick.pictures)
    return EvaluationPlan(
        protocol=protocol,
        full_epochs=full,
        quick_epochs=quick_epochs,
        training_passes=work.training_passes,
        full_passes=full_sets * work.full_passes,
        quick_passes=quick_passes,
        confirmation_passes=confirmed * work.full_passes,
        pictures=pictures,
    )


def _ladder(work: Workload) -> Iterator[tuple[int, int]]:
    """(epochs between evaluations, solver steps), the most telling first."""
    half = work.steps // 2
    for spacing in SPACING:
        if spacing * work.every_epochs < work.epochs:
            yield spacing * work.every_epochs, work.steps
            if half >= FEWEST_STEPS:
                yield spacing * work.every_epochs, half


def _largest(work: Workload, every: int, steps: int, limit: int) -> EvaluationPlan | None:
    """With as many pictures as fit; None where too few do."""

    def of(pictures: int) -> EvaluationPlan:
        # As many pictures and steps as a full one has are a full one, and nothing is left to be confirmed.
        same = pictures == work.pictures and steps == work.steps
        return lay_out(work, Protocol(every, None if same else Quick(pictures, steps)))

    sizes = range(work.fewest_pictures, work.pictures + 1)
    fitting = bisect_right(sizes[:-1], limit, key=lambda pictures: of(pictures).evaluation_passes)
    found = of(work.pictures)
    if found.evaluation_passes > limit:
        if not fitting:
            return None
        found = of(sizes[fitting - 1])
    return found if found.quick is None or found.quick_epochs else None


def _listed(epochs: tuple[int, ...]) -> str:
    """0, 2, 4, ..., 28 where they are many and evenly spaced."""
    if len(epochs) <= 6:
        return f"{', '.join(map(str, epochs[:-1]))} and {epochs[-1]}" if len(epochs) > 1 else str(epochs[0])
    return f"{', '.join(map(str, epochs[:3]))}, ..., {epochs[-1]} ({len(epochs)} of them)"
