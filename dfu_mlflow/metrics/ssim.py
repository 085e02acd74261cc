"""SSIM (Wang et al. 2004) of generated pictures and the nearest real photograph.

SSIM compares pictures of one scene. Unpaired, each generated picture is given the held-out photograph whose pixels are
nearest, and the figure says how alike those two are, not how good the picture is: best of N rewards blur. Photographs
of other patients give `ssim_between_patients`.
"""

from __future__ import annotations

import torch
from skimage.metrics import structural_similarity

from dfu_mlflow.metrics.extractors.pixels import PIXELS_SIZE_PX
from dfu_mlflow.metrics.intervals import Replicates, group_positions
from dfu_mlflow.metrics.metric import Metric
from dfu_mlflow.metrics.pair import Pair


def ssim(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """SSIM of pictures float64 [N, C, H, W], 0 to 255, row by row: [N].

    scikit-image's defaults: 7 x 7 uniform window, sample covariance, mean over the channels. 0.8 ms a pair at 64 px.
    """
    pairs = zip(first.numpy(), second.numpy(), strict=True)
    found = [structural_similarity(one, other, data_range=255, channel_axis=0) for one, other in pairs]
    return torch.tensor(found, dtype=torch.float64)


def _nearest(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """For each generated row the nearest real row, and the nearest of another patient than that: int64 [M] each."""
    products, person = pair.products, group_positions(pair.patients)
    distances = products.real.diagonal()[:, None] - 2 * products.cross
    first = distances.argmin(0)
    second = distances.masked_fill(person[:, None] == person[first], torch.inf).argmin(0)
    return first, second


def _between_patients(pair: Pair) -> torch.Tensor:
    """For each real row the nearest real row of another patient."""
    products, person = pair.products, group_positions(pair.patients)
    distances = products.real.diagonal() - 2 * products.real
    return distances.masked_fill(person[:, None] == person, torch.inf).argmin(1)


def _planes(features: torch.Tensor) -> torch.Tensor:
    return features.reshape(-1, 3, PIXELS_SIZE_PX, PIXELS_SIZE_PX)


def _values(pair: Pair) -> dict[str, float]:
    nearest = pair.real.features[_nearest(pair)[0]]
    return {
        "ssim_nearest_real": float(ssim(_planes(pair.fake.features), _planes(nearest)).mean()),
        "ssim_between_patients": float(_own(pair).mean()),
    }


def _own(pair: Pair) -> torch.Tensor:
    """SSIM of each real row and the nearest of another patient, [N]; `nan` where there is one patient alone."""
    if len(set(pair.patients)) < 2:
        return torch.full((pair.sizes[0],), torch.nan, dtype=torch.float64)
    real = _planes(pair.real.features)
    return ssim(real, real[_between_patients(pair)])


def _replicates(pair: Pair) -> dict[str, Replicates]:
    """Exact, with two comparisons a picture: a patient left out matters only where the nearest is that patient's."""
    real, fake, person = _planes(pair.real.features), _planes(pair.fake.features), group_positions(pair.patients)
    first, second = _nearest(pair)
    shown, instead = ssim(fake, real[first]), ssim(fake, real[second])
    change = torch.zeros(int(person.max()) + 1, dtype=torch.float64).index_add(0, person[first], instead - shown)
    own, count = _own(pair), len(shown)
    own_left = (own.sum() - torch.zeros_like(change).index_add(0, person, own)) / (len(own) - torch.bincount(person))
    return {
        "ssim_nearest_real": Replicates(
            float(shown.mean()), shown.mean() + change / count, (shown.sum() - shown) / (count - 1)
        ),
        "ssim_between_patients": Replicates(float(own.mean()), own_left, own.mean().repeat(count)),
    }


SSIM = Metric({"ssim_nearest_real": "larger", "ssim_between_patients": "neither"}, _values, _replicates)
