"""Weights that stay where they were: a starved learning rate, or updates lost in bfloat16."""

from __future__ import annotations

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking

STILL, SLOW = 2e-4, 2e-3
"""Displacement ||W - W0|| / ||W0|| of weights that have not moved, and of weights that have hardly moved.

Measured on the embedded base: 0.067 after 60 updates at 1e-3 (validation loss 0.51 -> 0.30), 0.07 after 120.
"""
AIM = 10 * SLOW
"""Displacement that the proposed rate is to reach: with Adam it grows with the rate."""
MOST = 100.0
"""Times that the rate is raised at most: beyond that the base's own scale is guessed."""
EARLY = 0.2
LEARNED = 0.02
"""Relative fall of the validation loss from which weights have moved enough, however little that is..."""
NEARER = 0.1
"""...unless the pictures have come less than this share of the way to the photographs: on the embedded base a rate of
3e-6 lowers the loss by 5 % and brings the pictures 2 to 5 % of the way, 1e-3 brings them 20 to 45 %."""
PROGRESS = ("eval/fid_progress", "eval/fd_progress", "eval/kid_progress")
CHANGED = 0.5
"""Share of elements that differ from the base's: with float32 masters nearly all do after a few updates, with bfloat16
ones 2 % a step at 1e-6."""


class WeightsNotMoving(Check):
    """Relative displacement, share of elements changed, and what was gained: a lower loss, nearer pictures."""

    id = "weights_not_moving"
    needs = ("model/displacement or base and checkpoint", "val/loss, if logged")
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """Small displacement is a fault only where little was learned by it."""
        evidence: dict[str, Figure] = {}
        changed = 1.0
        self._require_time(case)
        movement = case.bench.movement_if_known("live") if case.bench is not None and case.bench.has_weights else None
        if movement is not None:
            moved, changed = movement.displacement, movement.changed_share
            evidence["changed_share"] = Figure(changed, f"above {CHANGED}")
            stillest = min(movement.by_block, key=lambda block: movement.by_block[block])
            evidence[f"displacement.{stillest}"] = Figure(movement.by_block[stillest])
        else:
            moved = case.last("model/displacement")
        if moved == 0.0 and case.curves.get("epoch") and max(case.curves["epoch"]) == 0:
            raise Lacking("no epoch has been trained yet")
        evidence["displacement"] = Figure(moved, f"above {SLOW}, or a validation loss that fell")
        learned = self._learned(case)
        if learned is not None:
            evidence["validation_loss_fell_by"] = Figure(learned, f"above {LEARNED} of the base's")
        nearer = max((case.last(name) for name in PROGRESS if case.curves.get(name)), default=None)
        if nearer is not None:
            evidence["pictures_came_nearer_by"] = Figure(nearer, f"above {NEARER} of the way to the photographs")
        lost = changed < CHANGED
        gained = learned is not None and learned >= LEARNED and (nearer is None or nearer >= NEARER)
        slow = moved < SLOW and not gained
        if not lost and not slow:
            return Healthy(evidence)
        return self._finding(case, evidence, moved, changed)

    def _require_time(self, case: Case) -> None:
        """A run that goes on is not judged in its warm-up, nor in its first fifth."""
        updates = _updates(case)
        if updates == 0:
            raise Lacking("no update has been made yet")
        epochs, seen = case.settings.get("train.epochs"), case.curves.get("epoch")
        if updates is None or not epochs or not seen or max(seen) >= int(epochs):
            return
        warmup = int(case.settings.get("train.warmup_steps") or 0)
        if updates < 2 * warmup or max(seen) < EARLY * int(epochs):
            raise Lacking(f"after {updates} updates, {warmup} of them of warm-up at most, it is too soon to tell")

    def _finding(self, case: Case, evidence: dict[str, Figure], moved: float, changed: float) -> Finding:
        rate = case.settings.get("train.learning_rate")
        more = min(max(3.0, AIM / moved), MOST) if moved > 0 else 10.0
        fix: dict[str, object] = {}
        if rate is not None and moved < SLOW:
            fix["train.learning_rate"] = float(f"{more * float(rate):.2g}")
        warmup = case.settings.get("train.warmup_steps")
        updates = _updates(case)
        if warmup and updates and int(warmup) > updates // 5:
            evidence["warmup_steps"] = Figure(float(warmup), "a fifth of the updates at most")
            fix["train.warmup_steps"] = updates // 20
        why = "the learning rate is too small for this many updates"
        if changed < CHANGED and moved > 0:
            why = f"only {100 * changed:.0f} % of their elements differ, as if updates were rounded away in 16 bits"
            fix["train.mixed_precision"] = "no"
        return self.found(
            "blocker" if moved < STILL else "warning",
            0.9 if "validation_loss_fell_by" in evidence or moved < STILL else 0.7,
            evidence,
            f"The weights have moved by {moved:.2g} of their length: {why}.",
            fix,
        )

    def _learned(self, case: Case) -> float | None:
        """Relative fall of the validation loss since the untouched base."""
        losses = case.curves.get("val/loss", {})
        if 0 not in losses or len(losses) < 2:
            return None
        return 1 - losses[max(losses)] / losses[0]


def _updates(case: Case) -> int | None:
    """None where nothing tells."""
    try:
        return case.updates()
    except Lacking:
        return None
