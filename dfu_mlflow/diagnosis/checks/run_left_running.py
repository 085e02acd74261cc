"""A crashed run that looks alive."""

from __future__ import annotations

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking

SILENT_S = 1800.0
"""A run beats every 30 s where a step or a batch of pictures takes no longer: after half an hour it is gone."""


class RunLeftRunning(Check):
    """Status RUNNING without a sign of life."""

    id = "run_left_running"
    needs = ("an MLflow run's status and heartbeat",)
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """Compare the two."""
        if case.life is None:
            raise Lacking("this is no MLflow run, so it has no status")
        evidence = {
            "status": Figure(case.life.status),
            "silent_s": Figure(round(case.life.silent_s), f"below {SILENT_S:.0f} while RUNNING"),
        }
        if case.life.status != "RUNNING" or case.life.silent_s < SILENT_S:
            return Healthy(evidence)
        return self.found(
            "warning",
            0.9,
            evidence,
            f"MLflow says RUNNING, but nothing was heard for {case.life.silent_s / 3600:.1f} hours: the process is "
            "gone. "
            "Continue it, or end it as FAILED.",
            {"resume": "latest"},
        )
