"""Out of memory while sampling, not while training."""

from __future__ import annotations

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.checks.rank_deadlock import at_evaluation
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking

SIGNS = ("out of memory", "OutOfMemoryError", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "MemoryError")


class EvalOom(Check):
    """The reason the run ended, and whether its last step was an epoch's last."""

    id = "eval_oom"
    needs = ("exit.reason", "step/loss", "epoch")
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """Read the reason; in the middle of an epoch it was training that ran out."""
        if "exit.reason" not in case.tags:
            raise Lacking("the run does not say how it ended (tag exit.reason)")
        reason = case.tags["exit.reason"]
        if not any(sign.lower() in reason.lower() for sign in SIGNS):
            return Healthy({"exit_reason": Figure(reason[:200])})
        evaluating = at_evaluation(case)
        batch = int(case.settings.get("sampling.batch_size", 2))
        evidence = {
            "exit_reason": Figure(reason[:300]),
            "last_step": Figure(float(max(case.curves.get("step/loss") or {0: 0.0}))),
            "while": Figure("evaluating" if evaluating else "training"),
            "sampling_batch_size": Figure(float(batch)),
        }
        fix = {"sampling.batch_size": max(1, batch // 4), "train.mixed_precision": "bf16"}
        if not evaluating:
            fix = {"train.gradient_checkpointing": True, "train.mixed_precision": "bf16"}
        return self.found(
            "blocker",
            0.9 if evaluating else 0.5,
            evidence,
            "Memory ran out while pictures were drawn for evaluation: decode fewer at a time, in bf16."
            if evaluating
            else "Memory ran out in the middle of an epoch: that is training, not sampling.",
            fix,
        )
