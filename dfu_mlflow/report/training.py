"""The report of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dfu_mlflow.report.document import Picture, Report, Section, Table, png_source, svg_source
from dfu_mlflow.report.figures import Figures, epoch_axes, headline_table, other_table, with_quick
from dfu_mlflow.report.plots import curve_row

PLOTS_A_ROW = 2


@dataclass(frozen=True)
class TrainingStory:
    """What a report of training is made of.

    Attributes:
        run_id: the MLflow run.
        epochs: epoch -> its figures, as MLflow shows them.
        best_epoch, best_weights: the chosen checkpoint; weights are `live` or `ema`.
        verdict: against the success criterion.
        grids: class label -> epoch -> uint8 [H, W, 3], pictures from fixed seeds side by side.
        settings: name -> value, what a person compares runs by.
        identities: metric identities.
        notes: metric -> why it was not computed.
        extra: further sections, such as the diagnosis.
    """

    run_id: str
    epochs: Mapping[int, Figures]
    best_epoch: int
    best_weights: str
    verdict: str
    grids: Mapping[str, Mapping[int, np.ndarray]]
    settings: Mapping[str, str]
    identities: Sequence[str]
    notes: Mapping[str, str]
    extra: Sequence[Section] = ()


def training_report(story: TrainingStory) -> Report:
    """Headlines, curves, samples by epoch, settings."""
    group = "eval" if story.best_weights == "live" else "eval_ema"
    base, best = story.epochs.get(0, {}), story.epochs[story.best_epoch]
    missing = tuple(f"{metric}: not computed, because {reason}." for metric, reason in sorted(story.notes.items()))
    sections = (
        Section(
            f"Best checkpoint: epoch {story.best_epoch}, {story.best_weights} weights",
            missing,
            tables=(headline_table(base, best, group), other_table(best, group)),
        ),
        *story.extra,
        Section("By epoch", _explained(story), _curves(story)),
        Section("Samples", ("Fixed seeds: a column shows one seed becoming another picture.",), _samples(story)),
        Section("Settings", tables=(Table("", ("setting", "value"), tuple(story.settings.items())),)),
    )
    return Report(f"Training run {story.run_id[:8]}", _summary(story, base, best, group), sections, _footer(story))


def _summary(story: TrainingStory, base: Figures, best: Figures, group: str) -> tuple[str, ...]:
    sentences = [f"{max(story.epochs)} epochs of {story.settings.get('method', '?')} fine-tuning."]
    key = f"{group}/kid"
    if "eval/kid_low" in base and f"{key}_high" in best:
        if best[f"{key}_high"] < base["eval/kid_low"]:
            said = "It learned: KID fell"
        elif best[f"{key}_low"] > base["eval/kid_high"]:
            said = "It got worse than the untouched base: KID rose"
        else:
            said = "KID cannot be told apart from the untouched base's: it went"
        sentences.append(f"{said} from {base['eval/kid']:.3g} to {best[key]:.3g}.")
    return (*sentences, f"Success: {story.verdict}.")


def _explained(story: TrainingStory) -> tuple[str, ...]:
    said = ("Epoch 0 is the untouched base. Bands are 95 % intervals.",)
    if not with_quick(story.epochs):
        return said
    return (
        *said,
        "Quick figures (eval_quick/...) are of fewer pictures, the same seeds at every epoch, so that evaluation keeps "
        "to its budget: they are compared with each other alone, and the figures above are full ones.",
    )


def _curves(story: TrainingStory) -> tuple[Picture, ...]:
    axes = epoch_axes(story.epochs)
    rows = [axes[start : start + PLOTS_A_ROW] for start in range(0, len(axes), PLOTS_A_ROW)]
    return tuple(Picture(", ".join(axis.title for axis in row), svg_source(curve_row(row, "epoch"))) for row in rows)


def _samples(story: TrainingStory) -> tuple[Picture, ...]:
    """A picture a class: a row an epoch."""
    pictures = []
    for label, by_epoch in story.grids.items():
        epochs = sorted(by_epoch)
        pixels = np.concatenate([by_epoch[epoch] for epoch in epochs], axis=0)
        rows = ", ".join(str(epoch) for epoch in epochs)
        width = pixels.shape[1] * (2 if pixels.shape[1] <= 512 else 1)
        pictures.append(Picture(f"class {label}; rows are epochs {rows}", png_source(pixels), min(width, 1010)))
    return tuple(pictures)


def _footer(story: TrainingStory) -> tuple[str, ...]:
    identities = tuple(f"Metric identity: {identity}" for identity in story.identities)
    return (f"MLflow run {story.run_id}.", *identities, "Figures of different identities are never compared.")
