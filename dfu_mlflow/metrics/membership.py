"""Can training photographs be told from held-out ones by how much their loss fell?

A fine-tuned model fits every photograph of the kind better than its base did; what it fits better *still* it has
learned by heart. Losses come from a fixed grid of timesteps and noise (`dfu_mlflow.validation`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats

from dfu_mlflow.errors import UserError
from dfu_mlflow.types import Estimate

MIN_PATIENTS = 3


@dataclass(frozen=True)
class MemberLosses:
    """Losses of one side's photographs.

    Attributes:
        now: float64 [M, T], of the fine-tuned model.
        base: float64 [M, T], of the untouched base, same images, timesteps and noise.
        patients: who is on each of the M photographs.
    """

    now: torch.Tensor
    base: torch.Tensor
    patients: tuple[str, ...]

    def gains(self) -> torch.Tensor:
        """How much each photograph's mean loss fell: float64 [M].

        Raises:
            UserError: for losses that do not fit together or are not finite.
        """
        if self.now.shape != self.base.shape or len(self.now) != len(self.patients) or not len(self.patients):
            raise UserError(
                f"membership: losses {list(self.now.shape)} now, {list(self.base.shape)} of the base,"
                f" {len(self.patients)} patients: one row a photograph is needed"
            )
        gains = (self.base.double() - self.now.double()).mean(1)
        if not bool(gains.isfinite().all()):
            raise UserError("membership: losses hold values that are not finite: the weights are broken")
        return gains


def membership_auc(training: MemberLosses, held_out: MemberLosses) -> Estimate:
    """Area under the ROC curve of the gain in loss, training against held-out photographs: 0.5 tells nothing apart.

    The interval counts patients (Obuchowski 1997, "Nonparametric analysis of clustered ROC curve data"): each
    photograph's placement among the other side's, summed by patient. On the logit scale, Student's with Welch's degrees
    of freedom.
    Without an interval below 3 patients a side, and where the sides do not overlap at all.
    """
    positive, negative = training.gains(), held_out.gains()
    wins = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()
    area = float(wins.mean())
    parts = [
        _clustered(wins.mean(1) - area, training.patients),
        _clustered(wins.mean(0) - area, held_out.patients),
    ]
    variance = sum(part for part, _ in parts)
    if min(degrees for _, degrees in parts) < MIN_PATIENTS - 1 or not 0.0 < area < 1.0 or variance <= 0.0:
        return Estimate(area)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(stats.t.ppf(0.975, freedom)) * variance**0.5 / (area * (1 - area))
    centre = math.log(area / (1 - area))
    low, high = (1 / (1 + math.exp(-end)) for end in (centre - half, centre + half))
    return Estimate(area, low, high)


def _clustered(placements: torch.Tensor, patients: Sequence[str]) -> tuple[float, int]:
    """Variance of the mean of centred placements [M], patients being what varies, and its degrees of freedom."""
    names = {name: place for place, name in enumerate(sorted(set(patients)))}
    groups = torch.tensor([names[name] for name in patients])
    sums = torch.zeros(len(names), dtype=torch.float64).index_add(0, groups, placements)
    count = len(names)
    if count < 2:
        return 0.0, 0
    return float(sums.square().sum()) * count / (count - 1) / len(patients) ** 2, count - 1
