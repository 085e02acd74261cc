"""Does a classifier of the clinic's classes gain from a subject's pictures?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.data import evaluation_pixels
from dfu_mlflow.metrics.utility.arms import Pictures
from dfu_mlflow.metrics.utility.experiment import measure_utility
from dfu_mlflow.metrics.utility.report import UtilityReport
from dfu_mlflow.phases import phase
from dfu_mlflow.preparation import Material
from dfu_mlflow.runtime import derive_seed
from dfu_mlflow.sampling import Sampler
from dfu_mlflow.subject import Subject, base_sampler
from dfu_mlflow.types import Record

TUNED, BASE = "tuned", "base"


def utility(
    config: RunConfig, material: Material, subject: Subject, between_batches: Callable[[], None]
) -> UtilityReport:
    """Classifiers with and without the subject's pictures, beside the untouched base's and real ones drawn again.

    The generator learned from the training patients alone, and so do the classifiers; the held-out patients judge.

    Raises:
        UserError: for pictures that do not fit the photographs, or a single class.
    """
    split = material.source.split
    counts = Counter(record.label for record in split.train)
    wanted = {label: max(1, round(config.utility.ratio * counts[label])) for label in split.classes}
    if subject.sampler is not None:
        tuned = _draw(subject.sampler, wanted, config.utility.seed, between_batches)
    else:
        assert subject.pictures is not None
        tuned = Pictures(torch.from_numpy(subject.pictures.images), subject.pictures.class_ids)
    return measure_utility(
        split.classes,
        _photographs(split.train, split.classes, config),
        _photographs(split.held_out, split.classes, config),
        {TUNED: tuned, BASE: _draw(base_sampler(config, material), wanted, config.utility.seed, between_batches)},
        config.utility,
        between_batches,
    )


def _draw(sampler: Sampler, wanted: dict[str, int], seed: int, between_batches: Callable[[], None]) -> Pictures:
    ids = np.repeat(np.arange(len(wanted)), list(wanted.values()))
    numbers = [number for count in wanted.values() for number in range(count)]
    seeds = [derive_seed(seed, "utility", int(c), number) for c, number in zip(ids, numbers, strict=True)]
    class_ids = torch.from_numpy(ids)
    with phase("sampling for the classifiers", len(seeds), "pictures") as progress:
        images = sampler.generate(class_ids, seeds, between_batches=between_batches, progress=progress)
    return Pictures(torch.from_numpy(images), class_ids)


def _photographs(records: Sequence[Record], classes: tuple[str, ...], config: RunConfig) -> Pictures:
    return Pictures(
        evaluation_pixels(records, config.data),
        torch.tensor([classes.index(record.label) for record in records]),
        tuple(record.patient for record in records),
    )
