"""Choosing rows so that two sets have the same size and the same class proportions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FeatureRows:
    """Features of pictures, and what is known about each.

    Attributes:
        features: float64 [N, D].
        class_ids: int64 [N]; -1 where the class is not known.
        patients: who is on each picture, N names.
    """

    features: torch.Tensor
    class_ids: torch.Tensor
    patients: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.features) == len(self.class_ids) == len(self.patients):
            raise ValueError(
                f"{len(self.features)} feature rows, {len(self.class_ids)} class ids, {len(self.patients)} patients"
            )

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: torch.Tensor) -> FeatureRows:
        """A selection of rows, by index."""
        chosen = tuple(self.patients[row] for row in rows.tolist())
        return FeatureRows(self.features[rows], self.class_ids[rows], chosen)


def proportional_counts(class_ids: torch.Tensor, total: int) -> dict[int, int]:
    """Divide `total` over the classes as `class_ids` [N] are divided, see `divided`."""
    classes, sizes = torch.unique(class_ids, return_counts=True)
    return divided(dict(zip(classes.tolist(), sizes.tolist(), strict=True)), total)


def divided(sizes: Mapping[int, int], total: int) -> dict[int, int]:
    """Divide `total` over classes in proportion to their sizes: largest remainders, ties to the lower class."""
    shares = {c: total * size / sum(sizes.values()) for c, size in sizes.items()}
    counts = {c: int(share) for c, share in shares.items()}
    by_remainder = sorted(shares, key=lambda c: (counts[c] - shares[c], c))
    for c in by_remainder[: total - sum(counts.values())]:
        counts[c] += 1
    return counts


def matched_rows(class_ids: torch.Tensor, counts: Mapping[int, int], order: Sequence[int]) -> torch.Tensor:
    """The first `counts[c]` rows of each class in `order` (a permutation of the rows), in ascending order.

    A class with too few rows is made up for by the first rows of other classes that were left, so that the size, which
    the Frechet distance depends on, is right whenever there are rows enough.
    """
    wanted, chosen, spare = dict(counts), [], []
    for row in order:
        c = int(class_ids[row])
        if wanted.get(c, 0) > 0:
            wanted[c] -= 1
            chosen.append(row)
        else:
            spare.append(row)
    return torch.tensor(sorted(chosen + spare[: sum(wanted.values())]), dtype=torch.int64)


def row_order(rows: int, generator: torch.Generator) -> list[int]:
    """A random permutation of the rows."""
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    return order


def patient_order(patients: Sequence[str], generator: torch.Generator) -> list[int]:
    """Rows patient by patient, patients in random order."""
    names = sorted(set(patients))
    rank = {names[position]: place for place, position in enumerate(row_order(len(names), generator))}
    return sorted(range(len(patients)), key=lambda row: (rank[patients[row]], row))
