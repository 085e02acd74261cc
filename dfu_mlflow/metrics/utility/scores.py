"""Accuracy, Cohen's kappa, macro-F1 and recall from confusion counts: leaving a patient out costs a subtraction."""

from __future__ import annotations

import torch

SCORES = ("accuracy", "kappa", "macro_f1")
"""Beside them `recall/CLASS` for every class."""


def score_names(classes: tuple[str, ...]) -> tuple[str, ...]:
    """The scores of a classifier of these classes, in the order that `scores` gives them."""
    return (*SCORES, *(f"recall/{label}" for label in classes))


def confusion_counts(truth: torch.Tensor, found: torch.Tensor, groups: torch.Tensor, classes: int) -> torch.Tensor:
    """Confusion counts of each group: float64 [S, G, C, C], true class by row, named class by column.

    Args:
        truth: int64 [N], true classes.
        found: int64 [S, N], classes named in each of S repetitions.
        groups: int64 [N], 0 .. G - 1.
        classes: C.
    """
    repetitions, count = found.shape[0], int(groups.max()) + 1
    cells = (groups * classes + truth) * classes + found
    counts = torch.zeros(repetitions, count * classes * classes, dtype=torch.float64)
    counts.scatter_add_(1, cells, torch.ones_like(cells, dtype=torch.float64))
    return counts.reshape(repetitions, count, classes, classes)


def scores(confusion: torch.Tensor) -> torch.Tensor:
    """Scores [..., 3 + C] of confusion counts [..., C, C], in the order of `score_names`.

    Kappa is Cohen's (1960), unweighted. Macro-F1 is the mean over the classes that are true or named at least once, as
    scikit-learn's. What is not defined (recall of a class without test images) is NaN.
    """
    total = confusion.sum((-2, -1))
    hits = confusion.diagonal(dim1=-2, dim2=-1)
    true, named = confusion.sum(-1), confusion.sum(-2)
    agreed = hits.sum(-1) / total
    chance = (true * named).sum(-1) / total.square()
    f1 = 2 * hits / (true + named)
    return torch.cat(
        [torch.stack([agreed, (agreed - chance) / (1 - chance), f1.nanmean(-1)], dim=-1), hits / true], dim=-1
    )
