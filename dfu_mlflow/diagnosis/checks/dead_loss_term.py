"""A loss term that is counted and trains nothing."""

from __future__ import annotations

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.objective import TIMESTEPS

COUNTED = 0.005
"""Share of the logged loss below which a term is too small to matter."""
DEAD = 1e-4
"""Share of the gradient norm at or below which a term trains nothing; a live one of any use has a hundredth."""
CHANCE = 0.05
"""How likely a live term may be to look dead because no measured batch held a timestep that it applies to."""


class DeadLossTerm(Check):
    """Share of the value beside share of the gradient, of the perceptual term."""

    id = "dead_loss_term"
    needs = ("train/loss", "train/loss_perceptual", "train/grad_share_perceptual")
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """Compare the two shares over all epochs."""
        if case.settings.get("loss.perceptual_loss.enabled") is False:
            return Healthy({"perceptual_term": Figure("off")})
        if "train/grad_share_perceptual" not in case.curves and case.settings.get("loss.perceptual_loss.no_grad"):
            return self._told()
        term, total = case.curve("train/loss_perceptual"), dict(case.curve("train/loss"))
        values = [value / total[epoch] for epoch, value in term if total.get(epoch)]
        shares = [value for epoch, value in case.curve("train/grad_share_perceptual") if epoch > 0]
        if not values or not shares:
            raise Lacking("no epoch was trained with the perceptual term")
        evidence = {
            "value_share": Figure(max(values)),
            "gradient_share": Figure(max(shares), f"above {DEAD} where the term has a value"),
        }
        if max(values) < COUNTED or max(shares) > DEAD:
            return Healthy(evidence)
        missed = _chance_of_missing(case, len(shares))
        if missed > CHANCE:
            raise Lacking(f"a live term looks like this in {missed:.0%} of runs so short: train more epochs")
        return self.found(
            "blocker" if max(values) > 0.2 else "warning",
            1 - missed,
            evidence,
            f"The perceptual term is {100 * max(values):.0f} % of the logged loss and {100 * max(shares):.2g} % of the "
            "gradient: it is computed without gradient (a decode under no_grad, a detach), so it makes the loss larger "
            "and teaches nothing. Take it out, or let the gradient through the decoder.",
            {"loss.perceptual_loss.enabled": False},
        )

    def _told(self) -> Finding:
        return self.found(
            "warning",
            0.6,
            {"no_grad": Figure("yes", "no")},
            "The configuration says that the perceptual term is computed without gradient: it teaches nothing.",
            {"loss.perceptual_loss.enabled": False},
        )


def _chance_of_missing(case: Case, epochs: int) -> float:
    """That no sample of the first micro-batch of any epoch lies below the term's largest timestep."""
    window = float(case.settings.get("loss.perceptual_loss.max_timestep", TIMESTEPS))
    batch = int(case.settings.get("train.batch_size", 1))
    return float((1 - window / TIMESTEPS) ** (batch * epochs))
