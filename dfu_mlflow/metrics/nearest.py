"""The training photographs nearest to a picture, whatever of it a sampler may have learned by heart.

A sampler that copies gives back a photograph as its autoencoder renders it, and mirrored where training mirrored. So
each training photograph stands here in several *appearances*, and the distance to it is that of the closest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from dfu_mlflow.errors import UserError

ROWS = 256
"""Queries compared at a time."""


@dataclass(frozen=True)
class Neighbours:
    """How near the training photographs are to each of M pictures.

    Attributes:
        distance: float64 [M], to the nearest photograph, between features of unit length: sqrt(2 - 2 cosine).
        ratio: float64 [M], that distance over the mean distance to the nearest k photographs.
        index: int64 [M], which photograph is nearest.
    """

    distance: torch.Tensor
    ratio: torch.Tensor
    index: torch.Tensor

    @property
    def similarity(self) -> torch.Tensor:
        """Cosine to the nearest photograph, float64 [M]."""
        return 1 - self.distance.square() / 2


def nearest(
    queries: torch.Tensor,
    appearances: Sequence[torch.Tensor],
    neighbours: int,
    query_patients: Sequence[str] = (),
    patients: Sequence[str] = (),
) -> Neighbours:
    """Nearest training photographs of each query.

    Args:
        queries: features [M, D].
        appearances: features [N, D] each, row i always of photograph i.
        neighbours: k of the ratio; the nearest one is among them.
        query_patients, patients: who is on the queries and on the photographs; photographs of a query's own patient are
            left out. Empty leaves out nothing.

    Raises:
        UserError: for features that cannot be compared, or fewer than k photographs.
    """
    checked = [_unit(features, "photographs") for features in appearances]
    queries = _unit(queries, "queries")
    if len({(len(each), each.shape[1]) for each in checked}) != 1 or checked[0].shape[1] != queries.shape[1]:
        shapes = ", ".join(str(list(each.shape)) for each in (queries, *checked))
        raise UserError(f"features of unlike shape cannot be compared: {shapes}; use one extractor for all")
    if len(checked[0]) < neighbours:
        raise UserError(
            f"{len(checked[0])} training photographs, --memorisation.neighbours {neighbours} needs at least as many"
        )
    places = {name: place for place, name in enumerate(sorted({*query_patients, *patients}))}
    own = [torch.tensor([places[name] for name in names]) for names in (query_patients, patients)]
    parts = []
    for rows in torch.arange(len(queries)).split(ROWS):
        distances = _distances(queries[rows], checked)
        if query_patients:
            distances[own[0][rows][:, None] == own[1]] = torch.inf
        closest, index = distances.topk(neighbours, dim=1, largest=False)
        parts.append((closest[:, 0], _ratio(closest), index[:, 0]))
    empty = (torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64), torch.empty(0).long())
    columns = zip(*(parts or [empty]), strict=True)
    return Neighbours(*(torch.cat(column) for column in columns))


def _distances(queries: torch.Tensor, appearances: Sequence[torch.Tensor]) -> torch.Tensor:
    """[M, N], to the closest appearance. The product loses digits near zero: below 1e-6 distances are noise."""
    cosine = torch.stack([queries @ each.T for each in appearances]).amax(0)
    return (2 - 2 * cosine).clamp(min=0.0).sqrt()


def _ratio(closest: torch.Tensor) -> torch.Tensor:
    """First over mean of each row; a row of equal photographs only (mean zero) is no gap: 1."""
    mean = torch.where(closest.isfinite(), closest, 0.0).sum(1) / closest.isfinite().sum(1).clamp(min=1)
    ratio = torch.where(mean > 0, closest[:, 0] / mean, 1.0)
    return torch.where(ratio.isfinite(), ratio, 1.0)


def _unit(features: torch.Tensor, name: str) -> torch.Tensor:
    if features.ndim != 2 or not bool(torch.isfinite(features).all()):
        raise UserError(
            f"features of {name} are {list(features.shape)} or not finite: the images or extractor are broken"
        )
    return functional.normalize(features.double(), dim=1)
