"""A validation loss that jumps because its timesteps and noise are drawn anew each time."""

from __future__ import annotations

import numpy as np

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking

FEW = 5
GRID = {"evaluation.validation_timesteps": 8, "evaluation.validation_images": 64}
"""The least that a grid should hold; a run that jumps with as much as this needs twice of what it has."""
NOISY = 0.06
"""Median change from one evaluation to the next after the trend is taken off, as a share of the loss.

The founding run's 0.109, 0.095, 0.081, 0.095, 0.105, 0.074 jump by 0.15; on a fixed grid the embedded base's loss stays
within 0.01 of a smooth curve.
"""
BACK = 0.15
"""Share of its movement, the largest step apart, that the loss goes against its direction, at least: a curve that falls
steeply and then less so has large second differences without any noise, and one steep fall hides none of it. The
founding run's goes back by 0.46 of it, pure noise by half."""


class NoisyValidation(Check):
    """Epoch-to-epoch change beside its trend; with the model at hand, the spread over re-draws."""

    id = "noisy_validation"
    needs = ("val/loss over at least five evaluations", "the model, for re-draws")
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """Second differences cancel a smooth curve and keep noise: their size is sqrt(6) times the noise's."""
        points = [value for epoch, value in case.curve("val/loss", "validation/loss", "val_loss") if epoch > 0]
        if len(points) < FEW:
            raise Lacking(f"{len(points)} validation losses, {FEW} are needed to see noise")
        values = np.array(points)
        noise = float(np.median(np.abs(np.diff(values, n=2))) / 6**0.5 * 1.4826 / values.mean())
        steps = np.diff(values)
        steps = np.delete(steps, np.abs(steps).argmax())
        back = float(min(steps.clip(min=0).sum(), (-steps).clip(min=0).sum()) / max(np.abs(steps).sum(), 1e-12))
        evidence = {
            "noise": Figure(noise, f"below {NOISY} of the loss"),
            "back_and_forth": Figure(back, f"below {BACK} of its movement"),
            "median_step": Figure(float(np.median(np.abs(steps)) / values.mean())),
        }
        if noise < NOISY or back < BACK:
            return Healthy(evidence)
        if case.bench is not None and case.bench.has_base:
            try:
                spread: float | str = case.bench.redraw_spread()
            except Lacking as reason:
                spread = f"not measured: {reason}"[:200]
            evidence["spread_over_redraws"] = Figure(spread, "what one draw of timesteps and noise an image would add")
        return self.found(
            "warning",
            0.85,
            evidence,
            f"The validation loss jumps up and down by {100 * noise:.0f} % from one evaluation to the next: it is "
            "measured at random timesteps, or at too few. Keep images, timesteps and noise fixed, and take more.",
            {name: max(least, 2 * int(case.settings.get(name, 0))) for name, least in GRID.items()},
        )
