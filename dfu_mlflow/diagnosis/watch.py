"""The cheap checks while a run goes on: what fires is said at once, not after the last epoch."""

from __future__ import annotations

from collections.abc import Mapping

from dfu_mlflow.config import RunConfig, flatten
from dfu_mlflow.diagnosis.case import BEST_WEIGHTS_TAG, CLASSES_TAG, PICTURES_TAG, STEPS_TAG, Case
from dfu_mlflow.diagnosis.diagnose import Diagnosis, diagnose


class Watch:
    """Looks at a run's figures after each epoch.

    Args:
        config: the run's.
        steps_per_epoch: optimizer steps.
        classes: how many there are.
        pictures: that quick evaluations compare; None where there are none.
    """

    def __init__(self, config: RunConfig, steps_per_epoch: int, classes: int, pictures: int | None = None) -> None:
        self.settings = flatten(config)
        self.facts = {STEPS_TAG: str(steps_per_epoch), CLASSES_TAG: str(classes)}
        if pictures is not None:
            self.facts[PICTURES_TAG] = str(pictures)
        self.steps_per_epoch = steps_per_epoch
        self.rates: dict[int, float] = {}
        """Learning rate of each step of this process."""
        self.told: set[str] = set()

    def look(
        self, epochs: Mapping[int, Mapping[str, float]], best_weights: str | None = None
    ) -> tuple[Diagnosis, list[str]]:
        """Examine the figures so far.

        Args:
            epochs: epoch -> name -> value.
            best_weights: `live` or `ema`, of the best checkpoint so far; None before there is one.

        Returns:
            The diagnosis, and a sentence for each finding above a note that was not told before.
        """
        curves: dict[str, dict[int, float]] = {"step/loss": {}, "step/lr": self.rates}
        for epoch, figures in sorted(epochs.items()):
            for name, value in figures.items():
                curves.setdefault(name, {})[epoch] = value
            curves["step/loss"][epoch * self.steps_per_epoch] = figures.get("train/loss", 0.0)
        judged = {BEST_WEIGHTS_TAG: best_weights} if best_weights else {}
        diagnosis = diagnose(Case("this run", self.settings, curves, self.facts | judged), "cheap")
        grave = [each for each in diagnosis.findings if each.severity != "note"]
        news = [f"{each.severity} {each.id}: {each.explanation}" for each in grave if each.id not in self.told]
        self.told |= {each.id for each in grave}
        return diagnosis, news
