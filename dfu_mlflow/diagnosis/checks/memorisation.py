"""Copies of patients' photographs among the samples."""

from __future__ import annotations

from dfu_mlflow.diagnosis.bench import Bench
from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.memorisation import MemorisationProbe, membership
from dfu_mlflow.types import Estimate


class Memorisation(Check):
    """Neighbour-gap ratio of the pictures, calibrated on held-out patients; membership AUC against the base."""

    id = "memorisation"
    needs = ("pictures or the model", "photographs")
    cost = "probe"

    def examine(self, case: Case) -> Finding | Healthy:
        """Pictures first; the membership test where weights are at hand."""
        bench = case.ready()
        needed, there = bench.config.memorisation.neighbours, len(bench.material.source.split.train)
        if there < needed:
            raise Lacking(f"{there} training photographs are fewer than memorisation.neighbours {needed}")
        images = bench.pictures.images
        told = self._membership(bench)
        probe = MemorisationProbe(bench.config, bench.material, {"efficientnet_lite0": bench.extractor})
        report = probe.report(images, told)
        if report.found is None:
            raise Lacking(report.because)
        evidence = {
            name: Figure(value.value, "0" if "excess" in name else "")
            for name, value in report.values.items()
            if name.endswith(("copy_excess", "gap_share"))
        }
        if "split" in bench.unnamed:
            evidence["held_out_side"] = Figure("assumed unseen: the run's own split is not known")
        limit = bench.config.memorisation.max_membership_auc
        knows = told is not None and told.low is not None and told.low > limit
        if told is not None:
            evidence["membership_auc"] = Figure(told.value, f"lower end below {limit}")
        if not report.found and not knows:
            if "split" in bench.unnamed:
                raise Lacking(f"no copy was found among its pictures, which says little: {bench.unnamed['split']}")
            return Healthy(evidence)
        return self.found(
            "blocker" if report.found else "warning",
            0.95 if report.found else 0.7,
            evidence,
            f"{report.because[:1].upper()}{report.because[1:]}."
            if report.found
            else "Training photographs can be told from others by their loss: it begins to learn them by heart.",
            self._less(bench),
        )

    def _less(self, bench: Bench) -> dict[str, float]:
        """Half the training: fewer epochs, of a single one smaller steps."""
        train = bench.config.train
        return (
            {"train.epochs": train.epochs // 2}
            if train.epochs > 1
            else {"train.learning_rate": train.learning_rate / 2}
        )

    def _membership(self, bench: Bench) -> Estimate | None:
        if not bench.has_weights or not bench.unnamed.keys().isdisjoint(("split", "prompts")):
            return None  # held-out photographs it was trained on tell nothing, nor do losses under another caption
        return membership(bench.config, bench.material, bench.model(bench.shown), bench.between_batches)
