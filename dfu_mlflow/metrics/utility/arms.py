"""What each classifier learns from: the arms of the experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dfu_mlflow import runtime
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.matching import proportional_counts, row_order


@dataclass(frozen=True)
class Pictures:
    """Pictures with their classes.

    Attributes:
        images: uint8 [N, H, W, 3].
        labels: int64 [N], positions among the class labels.
        patients: who is on each, N names; empty for synthetic pictures.
    """

    images: torch.Tensor
    labels: torch.Tensor
    patients: tuple[str, ...] = ()

    def take(self, rows: torch.Tensor) -> Pictures:
        """A selection of rows, by index."""
        patients = tuple(self.patients[row] for row in rows.tolist()) if self.patients else ()
        return Pictures(self.images[rows], self.labels[rows], patients)


@dataclass(frozen=True)
class Arm:
    """What one kind of classifier learns from: rows of sets, copied only while it is used.

    Six arms of 2,145 pictures of 1,024 px would fill 60 GB together, and one 13 GB.

    Attributes:
        parts: sets with the rows taken from each.
    """

    parts: tuple[tuple[Pictures, torch.Tensor], ...]

    def collect(self) -> Pictures:
        """The pictures, part after part; patients are left out."""
        taken = [pictures.take(rows) for pictures, rows in self.parts]
        return Pictures(torch.cat([each.images for each in taken]), torch.cat([each.labels for each in taken]))


def training_arms(real: Pictures, synthetic: Mapping[str, Pictures], ratio: float, seed: int) -> dict[str, Arm]:
    """Arm -> what its classifiers learn from.

    `real`: real pictures alone. `oversampled`: as many more real pictures of each class, drawn again, as the augmented
    arms have synthetic ones: what more weight on rare classes is worth without any new picture. `with_NAME`: real and
    synthetic pictures. `only_NAME`: the same synthetic pictures alone (classification accuracy score, Ravuri and
    Vinyals 2019).

    Args:
        synthetic: name -> pictures, e.g. `tuned` and `base`. All give the same number of each class: `ratio` times the
            real pictures in the first one's proportions, or what the one with the fewest has.

    Raises:
        UserError: where the sets have no class in common.
    """
    counts = _common_counts(real, synthetic, ratio)
    everything = (real, torch.arange(len(real.labels)))
    arms = {"real": Arm((everything,))}
    if not synthetic:
        return arms
    rows = [_draw_again(real, class_id, count, seed) for class_id, count in counts.items()]
    arms["oversampled"] = Arm((everything, (real, torch.cat(rows))))
    for name, pictures in synthetic.items():
        chosen = (pictures, _first(pictures.labels, counts, seed))
        arms[f"with_{name}"] = Arm((everything, chosen))
        arms[f"only_{name}"] = Arm((chosen,))
    return arms


def _common_counts(real: Pictures, synthetic: Mapping[str, Pictures], ratio: float) -> dict[int, int]:
    if not synthetic:
        return {}
    sets = list(synthetic.values())
    wanted = proportional_counts(sets[0].labels, max(1, round(ratio * len(real.labels)))) if len(sets[0].labels) else {}
    counts = {c: min(count, *(int((each.labels == c).sum()) for each in sets)) for c, count in wanted.items()}
    if not sum(counts.values()):
        raise UserError(f"the synthetic sets {', '.join(synthetic)} share no class: the same classes are needed")
    return {c: count for c, count in sorted(counts.items()) if count}


def _first(labels: torch.Tensor, counts: Mapping[int, int], seed: int) -> torch.Tensor:
    """Rows with `counts[c]` of each class, chosen by seed, in ascending order."""
    order = torch.tensor(row_order(len(labels), runtime.generator(seed, "utility/synthetic")))
    return torch.cat([order[labels[order] == c][:count] for c, count in counts.items()]).sort().values


def _draw_again(real: Pictures, class_id: int, count: int, seed: int) -> torch.Tensor:
    """`count` rows of a class, every row equally often (give or take one)."""
    rows = torch.nonzero(real.labels == class_id).flatten()
    order = row_order(len(rows), runtime.generator(seed, "utility/oversampled", class_id))
    return rows[torch.tensor(order)[torch.arange(count) % len(rows)]] if order else rows
