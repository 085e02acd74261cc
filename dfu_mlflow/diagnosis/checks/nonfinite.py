"""NaN or infinity in loss, gradient or weights."""

from __future__ import annotations

import math

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy, Severity
from dfu_mlflow.diagnosis.lacking import Lacking

TOLERATED = 0.01
"""Share of skipped steps, or of a curve's points, up to which nothing is lost. fp16's search for its loss scale is not
counted among them: from 65,536 it skips up to 16 steps, more than this of a short run."""
LOSSES = ("step/loss", "train/loss", "val/loss", "loss", "train_loss", "validation/loss", "val_loss")


class Nonfinite(Check):
    """Skipped steps, the reason the run ended, the logged losses, and the weights themselves."""

    id = "nonfinite"
    needs = ("train/nonfinite_steps, a loss, exit.reason, or weights",)
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """Whatever of the four is at hand."""
        evidence: dict[str, Figure] = {}
        skipped = case.last("train/nonfinite_steps") if case.curves.get("train/nonfinite_steps") else None
        if skipped is not None:
            evidence["skipped_steps"] = Figure(skipped, "0")
        reason = case.tags.get("exit.reason", "")
        stopped = "not finite" in reason
        broken = False
        movement = case.bench.movement_if_known("live") if case.bench is not None and case.bench.has_weights else None
        if movement is not None:
            broken = not movement.finite
            evidence["weights"] = Figure("not finite" if broken else "finite", "finite")
        bad_share, lost = self._losses(case, evidence)
        if not evidence and not reason:
            raise Lacking("neither train/nonfinite_steps nor a loss was logged, and no weights are at hand")
        share = max((skipped or 0.0) / max(1, self._steps(case)), bad_share)
        if not broken and not stopped and not share:
            return Healthy(evidence)
        if stopped:
            evidence["exit_reason"] = Figure(reason[:300])
        severity: Severity = "blocker" if broken or stopped or lost else "warning" if share > TOLERATED else "note"
        return self.found(
            severity,
            0.99 if broken or stopped else 0.9,
            evidence,
            "The weights hold values that are not finite: everything after them is lost, go back to an older "
            "checkpoint."
            if broken
            else "Loss or gradient was not finite: the learning rate is too high for this precision, or a photograph "
            "gives values out of range.",
            {"train.mixed_precision": "no", **self._slower(case)},
        )

    def _losses(self, case: Case, evidence: dict[str, Figure]) -> tuple[float, bool]:
        """Largest share of a loss's points that are not finite, and whether one ends so."""
        share, lost = 0.0, False
        for name in LOSSES:
            points = case.curves.get(name)
            if not points:
                continue
            bad = [step for step, value in points.items() if not math.isfinite(value)]
            evidence[f"first_nonfinite {name}"] = Figure(float(min(bad)) if bad else "none", "none")
            share = max(share, len(bad) / len(points))
            lost = lost or max(points) in bad
        return share, lost

    def _steps(self, case: Case) -> int:
        try:
            return case.updates()
        except Lacking:
            return 1

    def _slower(self, case: Case) -> dict[str, float]:
        rate = case.settings.get("train.learning_rate")
        return {} if rate is None else {"train.learning_rate": float(rate) / 3}
