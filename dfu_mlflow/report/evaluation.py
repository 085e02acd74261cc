"""The report of one evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dfu_mlflow.report.album import fitting
from dfu_mlflow.report.document import Picture, Report, Section, Table, png_source
from dfu_mlflow.report.figures import Figures, headline_table, other_table

GROUP = "eval"


@dataclass(frozen=True)
class EvaluationStory:
    """What a report of an evaluation is made of.

    Attributes:
        name: what was evaluated.
        run_id: the MLflow run of the evaluation.
        base: figures of the untouched base, empty where it was not measured.
        figures: figures of the subject, as MLflow shows them.
        sentences: what is said first, e.g. the comparison with the base.
        grids: class label -> (row name -> uint8 [H, W, 3]).
        seeded: whether the subject drew from the seeds that the base drew from.
        extra: sections of further measurements, such as memorisation.
        settings: name -> value.
        identities: metric identities.
        notes: metric -> why it was not computed.
    """

    name: str
    run_id: str
    base: Figures
    figures: Figures
    sentences: Sequence[str]
    grids: Mapping[str, Mapping[str, np.ndarray]]
    seeded: bool
    extra: Sequence[Section]
    settings: Mapping[str, str]
    identities: Sequence[str]
    notes: Mapping[str, str]


def evaluation_report(story: EvaluationStory) -> Report:
    """Headlines beside floors and ceiling, all other figures, samples, further measurements."""
    missing = tuple((name, reason) for name, reason in sorted(story.notes.items()))
    sections = [
        Section("Headlines", tables=(headline_table(story.base, story.figures, GROUP),)),
        *story.extra,
        Section("Samples", ("Equal places are equal seeds.",) if story.seeded else (), _samples(story)),
        Section("All figures", tables=(other_table(story.figures, GROUP),)),
    ]
    if missing:
        sections.append(Section("Not computed, or with a reserve", tables=(Table("", ("figure", "because"), missing),)))
    sections.append(Section("Settings", tables=(Table("", ("setting", "value"), tuple(story.settings.items())),)))
    identities = tuple(f"Metric identity: {identity}" for identity in story.identities)
    footer = (f"MLflow run {story.run_id}.", *identities, "Figures of different identities are never compared.")
    return Report(f"Evaluation of {story.name}", tuple(story.sentences), tuple(sections), footer)


def _samples(story: EvaluationStory) -> tuple[Picture, ...]:
    pictures = []
    for label, rows in story.grids.items():
        width = min(pixels.shape[1] for pixels in rows.values())
        pixels = np.asarray(fitting(np.concatenate([row[:, :width] for row in rows.values()], axis=0)))
        shown = min(width * (2 if width <= 512 else 1), 1010)
        pictures.append(Picture(f"class {label}; rows: {', '.join(rows)}", png_source(pixels), shown))
    return tuple(pictures)
