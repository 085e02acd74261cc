"""Ranks that wait for each other, mostly in a metric that only some of them compute."""

from __future__ import annotations

import re

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking

EVALUATION = "the beginning of the evaluation"
SILENT_S = 1800.0
"""The default timeout of torch.distributed's collectives on NCCL is ten minutes, on gloo half an hour."""
TIMEOUTS = (
    "ProcessGroupNCCL",
    "Watchdog caught collective",
    "collective operation timeout",
    "Timed out waiting",
    "did not arrive at",
)
"""`dfu_mlflow.ranks` says the last one of a rank that lives and does not come, not of one that was killed."""


class RankDeadlock(Check):
    """Several ranks, silence, and the last step at an epoch's end, where evaluation begins."""

    id = "rank_deadlock"
    needs = ("runtime.num_processes or tags draws.rankN", "status and heartbeat, or exit.reason", "step/loss", "epoch")
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """A timeout that was told decides; silence after an epoch's last step makes it likely."""
        reason = case.tags.get("exit.reason", "")
        if any(sign in reason for sign in TIMEOUTS):
            waited = re.search(r"did not arrive at (.+) within", reason)
            return self._finding({"exit_reason": Figure(reason[:300])}, 0.95, waited[1] if waited else EVALUATION)
        ranks = case.ranks()
        evidence = {"ranks": Figure(float(ranks))}
        if ranks == 1:
            return Healthy(evidence)
        if case.life is None:
            raise Lacking("this is no MLflow run: whether it hangs cannot be seen")
        evidence["silent_s"] = Figure(round(case.life.silent_s), f"below {SILENT_S:.0f} while RUNNING")
        if case.life.status != "RUNNING" or case.life.silent_s < SILENT_S or not at_evaluation(case):
            return Healthy(evidence)
        return self._finding(evidence, 0.8, EVALUATION)

    def _finding(self, evidence: dict[str, Figure], confidence: float, place: str) -> Finding:
        return self.found(
            "blocker",
            confidence,
            evidence,
            f"The ranks wait for each other at {place}: one is stuck, or computes what synchronises all of them alone. "
            "No setting mends this: the code must let every rank come to the same places. Until then start one "
            "process.",
            {},
        )


def at_evaluation(case: Case) -> bool:
    """Was the evaluation that follows the last step (or comes before the first) due, and never logged?

    Raises:
        Lacking: where the steps of an epoch are not known.
    """
    steps = max(case.curves.get("step/loss") or {0: 0.0})
    evaluated = max(case.curves.get("epoch") or {-1: 0.0})
    if steps == 0 and evaluated < 0:
        return True
    per_epoch, every = case.steps_per_epoch(), int(case.settings.get("evaluation.every_epochs", 1))
    # Steps are logged every few: one within a logging interval of the end counts as the last.
    slack = int(case.settings.get("tracking.log_every_steps", 1)) - 1
    epoch = (steps + slack) // per_epoch
    due = epoch % every == 0 or epoch == case.settings.get("train.epochs")
    return epoch * per_epoch >= steps and due and epoch > evaluated
