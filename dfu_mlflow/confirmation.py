"""The best by quick figures is only a candidate: full figures decide between it and the last epoch's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dfu_mlflow.checkpoint import CheckpointStore, checkpoint_name, weights_file
from dfu_mlflow.evaluator import Measurement
from dfu_mlflow.history import History
from dfu_mlflow.verdict import score


def group(shown: str, quick: bool = False) -> str:
    """What the figures of these weights, `live` or `ema`, are logged under."""
    return f"eval{'_quick' if quick else ''}{'' if shown == 'live' else '_ema'}"


def validation_group(shown: str) -> str:
    """The same of validation losses, which every evaluation measures alike."""
    return "val" if shown == "live" else "val_ema"


def named(measurement: Measurement, shown: str, quick: bool = False) -> dict[str, float]:
    """Figures by the names that MLflow shows."""
    losses = {f"{validation_group(shown)}/{name}": value for name, value in measurement.validation.items()}
    return losses | {f"{group(shown, quick)}/{name}": value for name, value in measurement.figures.items()}


@dataclass(frozen=True)
class Candidate:
    """Weights that may be the best.

    Attributes:
        epoch: they were saved after.
        shown: `live` or `ema`.
        file: where they are.
    """

    epoch: int
    shown: str
    file: Path


def candidates(store: CheckpointStore, epoch: int, step: int, shown: Sequence[str]) -> list[Candidate]:
    """The best so far, and the weights of the last step, each once."""
    best = store.best()
    known = [] if best is None else [(int(best["epoch"]), str(best["shown"]), str(best["checkpoint"]))]
    known += [(epoch, each, checkpoint_name(step)) for each in shown]
    return [Candidate(at, which, weights_file(store.folder / name, which)) for at, which, name in dict.fromkeys(known)]


def lacks_figures(history: History, candidate: Candidate) -> bool:
    """Has it not been evaluated in full?"""
    prefix = f"{group(candidate.shown)}/"
    return not any(name.startswith(prefix) for name in history.figures(candidate.epoch))


def full_score(history: History, candidate: Candidate, metric: str) -> float | None:
    """Its score by full figures, smaller is better; None where it has none."""
    known = history.figures(candidate.epoch)
    prefixes = {f"{group(candidate.shown)}/": "", f"{validation_group(candidate.shown)}/": "val_"}
    figures = {
        plain + name.removeprefix(prefix): value
        for prefix, plain in prefixes.items()
        for name, value in known.items()
        if name.startswith(prefix)
    }
    return score(figures, metric)
