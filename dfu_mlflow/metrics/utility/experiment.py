"""Train classifiers with and without synthetic pictures on the training patients, judge them on held-out patients.

The generator must have seen the training patients alone. One call is one generator and one division of the patients
(one fold); `report.pool` joins several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from dfu_mlflow.config.measures import UtilityConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.extractors.base import check_images
from dfu_mlflow.metrics.utility.arms import Pictures, training_arms
from dfu_mlflow.metrics.utility.report import Named, UtilityReport, utility_report
from dfu_mlflow.metrics.utility.training import name_classes, train_classifier
from dfu_mlflow.phases import phase
from dfu_mlflow.runtime import derive_seed

PROTOCOL = 1
"""Raised by whoever changes what a figure means."""


def measure_utility(
    classes: tuple[str, ...],
    training: Pictures,
    held_out: Pictures,
    synthetic: Mapping[str, Pictures],
    config: UtilityConfig,
    between_steps: Callable[[], None] = lambda: None,
) -> UtilityReport:
    """Train `config.seeds` classifiers in every arm, all for the same number of steps, and score them.

    Args:
        classes: labels; a label in `Pictures` is a position here.
        training: real pictures of the patients that the generator learned from.
        held_out: real pictures of other patients.
        synthetic: name -> pictures; `tuned` is the fine-tuned model's, `base` the untouched base's by convention.
        between_steps: called before each optimizer step; raises to stop.

    Raises:
        UserError: for patients on both sides, pictures that do not fit together, or a network that cannot be built.
    """
    _check(classes, training, held_out, synthetic)
    arms = training_arms(training, synthetic, config.ratio, config.seed)
    found: dict[str, torch.Tensor] = {}
    with phase("training classifiers", len(arms) * config.seeds * config.steps, "steps") as progress:

        def step() -> None:
            between_steps()
            progress.advance()

        for arm, sources in arms.items():
            pictures, rows = sources.collect(), []
            progress.detail(arm)
            for number in range(config.seeds):
                seed = derive_seed(config.seed, "utility", number)
                classifier = train_classifier(pictures.images, pictures.labels, len(classes), config, seed, step)
                rows.append(name_classes(classifier, held_out.images, 4 * config.batch_size))
            found[arm] = torch.stack(rows)
    named = Named(classes, held_out.labels, held_out.patients, found, 1, _identity(config, training))
    return utility_report(named)


def _check(classes: tuple[str, ...], training: Pictures, held_out: Pictures, synthetic: Mapping[str, Pictures]) -> None:
    for name, pictures in {"training": training, "held-out": held_out, **synthetic}.items():
        check_images(pictures.images)
        if len(pictures.labels) != len(pictures.images) or not len(pictures.labels):
            raise UserError(f"{name} pictures: {len(pictures.images)} images with {len(pictures.labels)} labels")
        if int(pictures.labels.min()) < 0 or int(pictures.labels.max()) >= len(classes):
            raise UserError(f"{name} pictures have classes outside of {', '.join(classes)}")
        if pictures.images.shape != (len(pictures.images), *training.images.shape[1:]):
            raise UserError(
                f"{name} pictures are {list(pictures.images.shape[1:3])} px, training ones"
                f" {list(training.images.shape[1:3])}: generate and read them at one --data.resolution_px"
            )
    for name, pictures in (("training", training), ("held-out", held_out)):
        if len(pictures.patients) != len(pictures.labels):
            raise UserError(f"{name} pictures: {len(pictures.patients)} patients for {len(pictures.labels)} images")
    if shared := set(training.patients) & set(held_out.patients):
        raise UserError(
            f"{len(shared)} patients are in training and held out ({', '.join(sorted(shared)[:3])}): the classifier"
            " would be judged on patients it has seen; check --data.group_by"
        )
    if len(torch.unique(training.labels)) < 2:
        raise UserError("training pictures show one class only: a classifier needs at least two")


def _identity(config: UtilityConfig, training: Pictures) -> str:
    size = config.size_px or "own"
    start = "pretrained" if config.pretrained and config.network != "small_cnn" else "random"
    return (
        f"{config.network} ({start} weights, {size} size of {training.images.shape[1]} px); {config.steps} steps of"
        f" {config.batch_size} at {config.learning_rate:g}; ratio {config.ratio:g}; {config.seeds} seeds from"
        f" {config.seed}; protocol {PROTOCOL}"
    )
