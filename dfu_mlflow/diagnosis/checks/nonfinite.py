"""NaN or infinity in loss, gradient or weights."""

from __future__ import annotations

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy, Severity
from dfu_mlflow.diagnosis.lacking import Lacking

TOLERATED = 0.01
"""Share of skipped steps up to which nothing is lost; fp16's search for its loss scale stays below it."""


class Nonfinite(Check):
    """Skipped steps, the reason the run ended, and the weights themselves."""

    id = "nonfinite"
    needs = ("train/nonfinite_steps, exit.reason, or weights",)
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """Whatever of the three is at hand."""
        evidence: dict[str, Figure] = {}
        skipped = case.last("train/nonfinite_steps") if case.curves.get("train/nonfinite_steps") else None
        if skipped is not None:
            evidence["skipped_steps"] = Figure(skipped, "0")
        reason = case.tags.get("exit.reason", "")
        stopped = "not finite" in reason
        broken = False
        if case.bench is not None and case.bench.has_weights:
            broken = not case.bench.movement("live").finite
            evidence["weights"] = Figure("not finite" if broken else "finite", "finite")
        if not evidence and not reason:
            raise Lacking("no train/nonfinite_steps was logged and no weights are at hand")
        share = (skipped or 0.0) / max(1, self._steps(case))
        if not broken and not stopped and not skipped:
            return Healthy(evidence)
        if stopped:
            evidence["exit_reason"] = Figure(reason[:300])
        severity: Severity = "blocker" if broken or stopped else "warning" if share > TOLERATED else "note"
        return self.found(
            severity,
            0.99 if broken or stopped else 0.9,
            evidence,
            "The weights hold values that are not finite: everything after them is lost, go back to an older "
            "checkpoint."
            if broken
            else "Steps were skipped because loss or gradient was not finite: the learning rate is too high for this "
            "precision, or a photograph gives values out of range.",
            {"train.mixed_precision": "no", **self._slower(case)},
        )

    def _steps(self, case: Case) -> int:
        try:
            return case.updates()
        except Lacking:
            return 1

    def _slower(self, case: Case) -> dict[str, float]:
        rate = case.settings.get("train.learning_rate")
        return {} if rate is None else {"train.learning_rate": float(rate) / 3}
