"""Training photographs that generated pictures come nearer to than held-out photographs do.

Dar et al. 2024, "Unconditional latent diffusion models memorize patient imaging data": a threshold that 5 % of training
photographs' similarities to their nearest held-out photograph are above; training photographs whose similarity to their
nearest generated picture is above it are matched. Counts are equal on both sides: a larger set holds nearer ones.

One generated picture matches a few of a thousand photographs at best, so this tells a model that copies much, not one
that copies a twentieth of the time, and it decides nothing here. On phantoms (240 generated, 1,020 in training) an
honest generator is at +0.5 % (standard deviation 1.6), 5 % copies at +2.0 and 10 % at +3.5; in `coarse_pixels` at +2.6
(2.3), +3.8 and +5.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from scipy import stats
from torch.nn import functional

from dfu_mlflow import runtime
from dfu_mlflow.metrics.copies import TrainingAppearances
from dfu_mlflow.metrics.matching import row_order
from dfu_mlflow.types import Estimate

EXPECTED = 0.05
MIN_GROUPS = 3


def matched_training_excess(generated: torch.Tensor, features: TrainingAppearances, seed: int) -> Estimate:
    """Share of training photographs matched by generated features [M, D], less the expected 5 %.

    The larger side is reduced by seed. The interval is from leaving out training patients, held-out patients and groups
    of generated pictures, one at a time (jackknife).
    """
    held_out = features.held_out
    count = min(len(generated), len(held_out))
    orders = [
        torch.tensor(sorted(row_order(rows, runtime.generator(seed, f"metrics/matched/{side}"))[:count]))
        for side, rows in (("held-out", len(held_out)), ("generated", len(generated)))
    ]
    real = _similarities(features.appearances, held_out.features[orders[0]])
    fake = _similarities(features.appearances, generated[orders[1]])
    real_best, fake_best = real.amax(1), fake.amax(1)
    sides = (
        (_positions(features.training.patients), lambda kept: _excess(real_best[kept], fake_best[kept])),
        (
            _positions([held_out.patients[row] for row in orders[0].tolist()]),
            lambda kept: _excess(real[:, kept].amax(1), fake_best),
        ),
        (torch.arange(count) % 40, lambda kept: _excess(real_best, fake[:, kept].amax(1))),
    )
    value = _excess(real_best, fake_best)
    parts = [_variance(groups, without) for groups, without in sides]
    return _estimate(value, [part for part in parts if part is not None], len(sides))


def _similarities(appearances: Sequence[torch.Tensor], others: torch.Tensor) -> torch.Tensor:
    """Cosines [N, M] of the closest appearance."""
    others = functional.normalize(others.double(), dim=1)
    return torch.stack([functional.normalize(each.double(), dim=1) @ others.T for each in appearances]).amax(0)


def _excess(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Of each training photograph's closest held-out and generated picture."""
    return float((fake > real.quantile(1 - EXPECTED)).double().mean()) - EXPECTED


def _variance(groups: torch.Tensor, without: Callable[[torch.Tensor], float]) -> tuple[float, int] | None:
    """Jackknife variance and degrees of freedom; None for too few groups."""
    names = torch.unique(groups)
    if len(names) < MIN_GROUPS:
        return None
    values = torch.tensor([without(groups != name) for name in names], dtype=torch.float64)
    return float((values - values.mean()).square().sum()) * (len(names) - 1) / len(names), len(names) - 1


def _estimate(value: float, parts: Sequence[tuple[float, int]], sides: int) -> Estimate:
    variance = sum(part for part, _ in parts)
    if len(parts) < sides or variance <= 0.0:
        return Estimate(value)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(stats.t.ppf(0.975, freedom)) * variance**0.5
    return Estimate(value, value - half, value + half)


def _positions(patients: Sequence[str]) -> torch.Tensor:
    names = {name: place for place, name in enumerate(sorted(set(patients)))}
    return torch.tensor([names[name] for name in patients])
