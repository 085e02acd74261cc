"""A training run as its main rank measures it; `training_run` adds where the figures go."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from dfu_mlflow.base_evaluation import seen_before
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.confirmation import Candidate, candidates, full_score, lacks_figures
from dfu_mlflow.data import dataset_digest
from dfu_mlflow.evaluator import Baseline, Measurement, Observation
from dfu_mlflow.history import History
from dfu_mlflow.participant import Equipment, Look, Participant
from dfu_mlflow.ranks import Ranks
from dfu_mlflow.trainer import Score
from dfu_mlflow.verdict import score


class MeasuredRun(Participant):
    """A training run's figures.

    Args:
        config, equipment, ranks, folder, facts: as `Participant`.
        baselines: what the untouched base was measured as, by everything that it depends on, for runs that share it.
    """

    def __init__(
        self,
        config: RunConfig,
        equipment: Equipment,
        ranks: Ranks,
        folder: Path,
        facts: dict[str, Any],
        baselines: dict[str, Measurement],
    ) -> None:
        super().__init__(config, equipment, ranks, folder, facts)
        self.baselines = baselines
        self.history = History(folder / "history.json")

    def identities(self) -> dict[str, str]:
        """What figures depend on, those of quick evaluations apart: neither is compared with the other."""
        sets = {"metric_identity": self.panels.panels}
        if self.quick is not None:
            sets["metric_identity_quick"] = self.quick.panels
        return {name: "; ".join(panel.reference.identity for panel in panels) for name, panels in sets.items()}

    def observe(self, epoch: int) -> tuple[Observation | None, Observation | None]:
        """Look at the weights in the UNet; at the untouched base once for all runs that share it."""
        if epoch > 0:
            return super().observe(epoch)
        if self.quick is None and self.base_identity() in self.baselines:
            return None, None
        observe = partial(super().observe, epoch)
        if self.ranks.count > 1:  # the others would wait for a share that is not computed
            return observe()
        material, adapter = self.material, self.config.adapter.model_dump_json()
        facts = f"{self.base_identity()} {self.plan.protocol} {adapter} {dataset_digest(material.source.split)}"
        return seen_before(material.cache.folder, facts, material.device, observe)

    def measure(self, epoch: int, shown: str, seen: Observation | None, base: Baseline | None) -> Measurement:
        """The figures of what was seen; the untouched base's once for all runs that share it."""
        known = self.baselines if epoch == 0 else {}
        key = self.base_identity() if epoch == 0 else ""
        if key not in known:
            assert seen is not None
            known[key] = self.evaluator.judge(seen, shown, base)
        return known[key]

    def measured_quickly(self, epoch: int, looks: dict[str, Look]) -> dict[str, Measurement]:
        """The figures of quick looks."""
        if self.quick is None:
            return {}
        base = self.history.baseline(quick=True) if epoch > 0 else None
        seen = {shown: look.quick for shown, look in looks.items() if look.quick is not None}
        return {shown: self.quick.judge(each, shown, base) for shown, each in seen.items()}

    def base_identity(self) -> str:
        """Everything that the untouched base's figures depend on."""
        material, objective = self.material, self.config.loss.prediction_type
        facts: list[Any] = [self.settings, material.source.prompts, self.config.prompts.negative_prompt, objective]
        facts += [self.config.evaluation, sorted(material.digests.items()), self.config.train.mixed_precision]
        facts += [self.config.sampling.batch_size, *(panel.reference.identity for panel in self.panels.panels)]
        return repr(facts)

    def movement(self, moved: dict[str, float]) -> dict[str, float]:
        """How far the weights have come, and how much of it the average shows."""
        if math.isnan(moved["live"]):
            return {}
        figures = {"model/displacement": moved["live"]}
        if "ema" in moved and moved["live"] > 0:
            figures["ema/coverage"] = moved["ema"] / moved["live"]
        return figures

    def best_score(self, measured: dict[str, Measurement]) -> Score | None:
        """The better of the measured weights, by the configured metric."""
        metric = self.config.evaluation.best_metric
        scores = []
        for shown, measurement in measured.items():
            value = score(measurement.figures | {f"val_{k}": v for k, v in measurement.validation.items()}, metric)
            if value is not None:
                scores.append(Score(value, shown))
        return min(scores, key=lambda one: one.value) if scores else None

    def candidates(self) -> list[Candidate]:
        """The best checkpoint so far, by quick figures, and the weights of the last step."""
        last = self.epochs_done
        return candidates(self.trainer.store, last, self.trainer.progress.step, self.shown_weights(last))

    def unconfirmed(self) -> list[Candidate]:
        """Candidates without full figures, those of the last epoch first: the file of another one replaces them."""
        found = [each for each in self.candidates() if lacks_figures(self.history, each)]
        return sorted(found, key=lambda each: -each.epoch)

    def choose(self) -> None:
        """Let full figures say which of the candidates is the best checkpoint."""
        metric = self.config.evaluation.best_metric
        scored = [(each, full_score(self.history, each, metric)) for each in self.candidates()]
        known = [(value, each) for each, value in scored if value is not None]
        if known:
            value, best = min(known, key=lambda one: one[0])
            facts = {"epoch": best.epoch, "score": value, "shown": best.shown}
            self.trainer.store.mark_best(best.file.parent.name, facts)
