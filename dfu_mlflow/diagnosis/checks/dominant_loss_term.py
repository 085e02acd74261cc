"""An auxiliary term that outweighs the diffusion loss."""

from __future__ import annotations

from statistics import mean, median_low

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking

HIGH, OVERWHELMING = 0.5, 0.8
"""Share of the gradient norm from which an auxiliary term is no longer auxiliary, and from which it is the
objective."""
VALUE_HIGH = 0.6
"""Share of the loss's value from which to suspect it where no gradient was measured (6.08 against 0.08 gave 0.99)."""
WHOLE = 0.999
"""A larger share is taken for this: the diffusion loss has no part in it."""
WANTED = 0.2
"""Share of the gradient that the fix aims at."""


class DominantLossTerm(Check):
    """Gradient share of the perceptual term, or its share of the value where gradients were not logged."""

    id = "dominant_loss_term"
    needs = ("train/grad_share_perceptual or train/loss_perceptual",)
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """The whole training's share, the largest epoch apart, so that one odd batch decides nothing.

        The term acts on late timesteps alone, and a step of few samples has none of these: gradients add up over
        epochs, so what is averaged is the ratio of the terms, not the share.
        """
        if case.settings.get("loss.perceptual_loss.enabled") is False:
            return Healthy({"perceptual_term": Figure("off")})
        measured = "train/grad_share_perceptual" in case.curves
        share, limit = self._share(case, measured)
        name = "gradient_share" if measured else "value_share"
        evidence = {name: Figure(share, f"below {limit}")}
        if share < limit:
            return Healthy(evidence)
        fix: dict[str, object] = {"loss.perceptual_loss.enabled": False}
        weight = case.settings.get("loss.perceptual_loss.weight")
        if weight is not None and share < WHOLE:
            evidence["weight"] = Figure(float(weight))
            fix = {
                "loss.perceptual_loss.weight": float(
                    f"{float(weight) * WANTED / (1 - WANTED) * (1 - share) / share:.2g}"
                )
            }
        return self.found(
            "blocker" if share > OVERWHELMING else "warning",
            0.9 if measured else 0.6,
            evidence,
            f"The perceptual term makes {100 * share:.0f} % of the {'gradient' if measured else 'loss'}: the network "
            "learns "
            "to please it instead of denoising. Lower its weight, or switch it off.",
            fix,
        )

    def _share(self, case: Case, measured: bool) -> tuple[float, float]:
        if measured:
            values = [value for epoch, value in case.curve("train/grad_share_perceptual") if epoch > 0]
        else:
            total = dict(case.curve("train/loss"))
            values = [v / total[e] for e, v in case.curve("train/loss_perceptual") if total.get(e)]
        if not values:
            raise Lacking("no epoch was trained")
        if not measured:
            return median_low(values), VALUE_HIGH
        kept = sorted(min(value, WHOLE) for value in values)[: max(1, len(values) - 1)]
        ratio = mean(value / (1 - value) for value in kept)
        return ratio / (1 + ratio), HIGH
