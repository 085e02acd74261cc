"""How many generated pictures are copies of training photographs, judged by what other patients' photographs look like.

Neighbour-gap ratio (Carlini et al. 2023, "Extracting training data from diffusion models", section 4.2): the distance
to the nearest training photograph over the mean distance to the nearest 50. A generator of few but new pictures does
not lower it, because its neighbours are as far apart as anyone's.

- `gap_share`: generated pictures with a ratio below their 0.5; `gap_share_real`: photographs of *other patients* below.
- `copy_excess`: generated pictures below the threshold, less the share of other patients' photographs below it. This
  decides. The threshold is 0.4: at 0.5 a generator of 1 to 12 poses without a copy is called a copier in 8 to 16 % of
  cases (`coarse_pixels`, 1,020 training phantoms, 240 generated), at 0.4 in 0.3 to 2 %. It falls further where one
  person stands under several names, whose repeat visits look like copies of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats

from dfu_mlflow.config.measures import MemorisationConfig
from dfu_mlflow.metrics.intervals import proportion_estimate
from dfu_mlflow.metrics.matching import FeatureRows
from dfu_mlflow.metrics.nearest import Neighbours, nearest
from dfu_mlflow.types import Estimate

GAP = 0.5
"""Carlini's ratio."""


@dataclass(frozen=True)
class TrainingAppearances:
    """Real photographs in one kind of features.

    Attributes:
        training: training photographs as a sampler would render them (through the autoencoder, where there is one).
        held_out: photographs of other patients, rendered alike.
        appearances: features [N, D] each, row i always of training photograph i, in every way a copy may show it: as it
            is, through the autoencoder, mirrored. `training.features` should be among them.
    """

    training: FeatureRows
    held_out: FeatureRows
    appearances: tuple[torch.Tensor, ...]


class CopyReference:
    """What the distances of real photographs to other patients' photographs look like: built once, asked often.

    Attributes:
        threshold: ratio below which a generated picture counts as a copy.
        real: neighbours of the real photographs among training photographs of other patients.
        patients: who is on each of those photographs.
        real_share: share of them with a ratio below 0.5: repeat visits under another name, or look-alikes.
    """

    def __init__(self, features: TrainingAppearances, config: MemorisationConfig) -> None:
        self.features, self.config = features, config
        known, other = features.training, features.held_out
        self.patients = known.patients + other.patients
        queries = torch.cat([known.features, other.features])
        self.real = nearest(queries, features.appearances, config.neighbours, self.patients, known.patients)
        self.threshold = min(config.threshold, float(self.real.ratio.quantile(config.tail)))
        self.real_share = clustered_share(self.real.ratio < GAP, self.real.ratio, self.patients)
        self._below = clustered_share(self.real.ratio < self.threshold, self.real.ratio, self.patients)

    def neighbours(self, generated: torch.Tensor) -> Neighbours:
        """The training photographs nearest to generated features [M, D]."""
        return nearest(generated, self.features.appearances, self.config.neighbours)

    def figures(self, found: Neighbours) -> dict[str, Estimate]:
        """`gap_share` with Wilson's interval, `gap_share_real`, `copy_excess` (see the module)."""
        trials = len(found.ratio)
        return {
            "gap_share": proportion_estimate(int((found.ratio < GAP).sum()), trials),
            "gap_share_real": self.real_share,
            "copy_excess": share_excess(found.ratio < self.threshold, self._below),
        }


def similar_share(found: Neighbours, reference: CopyReference, level: float) -> dict[str, Estimate]:
    """Generated pictures whose cosine to the nearest training photograph is above `level`, beside the real ones'.

    For SSCD (Pizzi et al. 2022) levels of 0.5 and 0.75 are in use; on clinical photographs repeat visits reach them
    too, so the share means something beside that of other patients alone.
    """
    above = found.similarity > level
    real = clustered_share(reference.real.similarity > level, reference.real.similarity, reference.patients)
    return {
        "similar_share": proportion_estimate(int(above.sum()), len(above)),
        "similar_share_real": real,
        "similar_excess": share_excess(above, real),
    }


def share_excess(found: torch.Tensor, real: Estimate) -> Estimate:
    """Share of `found` bool [M] less the share of real photographs, with a 95 % interval.

    Newcombe's (1998, method 10) for a difference of shares, from Wilson's interval of independent generated pictures
    and the clustered one of real photographs.

    Raises:
        ValueError: for a share without an interval.
    """
    generated = proportion_estimate(int(found.sum()), len(found))
    if generated.low is None or generated.high is None or real.low is None or real.high is None:
        raise ValueError("the excess of a share needs the real share's interval")
    value = generated.value - real.value
    below = ((generated.value - generated.low) ** 2 + (real.high - real.value) ** 2) ** 0.5
    above = ((generated.high - generated.value) ** 2 + (real.value - real.low) ** 2) ** 0.5
    return Estimate(value, value - below, value + above)


def clustered_share(flags: torch.Tensor, scores: torch.Tensor, patients: Sequence[str]) -> Estimate:
    """Share of flags bool [N], patients being what varies: Wilson's interval at the effective number of rows.

    That number (Korn and Graubard 1998) is a figure's variance between rows over the variance of its mean between
    patients. It is taken for the flags and for the scores float64 [N] behind them, which also tell where none or one of
    the rows is flagged, and the smaller one counts.
    """
    names = {name: place for place, name in enumerate(sorted(set(patients)))}
    groups = torch.tensor([names[name] for name in patients])
    effective = min(_effective_rows(flags.double(), groups), _effective_rows(scores, groups))
    share = float(flags.double().mean())
    return Estimate(share, *_wilson(share, effective))


def _effective_rows(values: torch.Tensor, groups: torch.Tensor) -> float:
    """Between 1 and N; N where nothing varies."""
    rows, centred = len(values), values - values.mean()
    sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add(0, groups, centred)
    if len(sums) < 2 or float(sums.square().sum()) == 0.0:
        return float(rows) if len(sums) > 1 else 1.0
    clustered = float(sums.square().sum()) * len(sums) / (len(sums) - 1) / rows**2
    return min(float(rows), max(1.0, float(centred.square().mean()) / clustered))


def _wilson(share: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % interval for a number of trials that need not be whole."""
    z = float(stats.norm.ppf(0.975))
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * (share * (1 - share) / trials + z * z / (4 * trials**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
