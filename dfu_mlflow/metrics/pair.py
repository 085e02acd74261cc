"""Two sets of pictures side by side: what every metric takes."""

from __future__ import annotations

from functools import cached_property

import torch

from dfu_mlflow.metrics.gram import Gram, gram
from dfu_mlflow.metrics.matching import FeatureRows


class Pair:
    """Real rows and generated rows, with their inner products computed once.

    Args:
        real: N photographs.
        fake: M generated pictures; every one is its own "patient".
        products: their inner products, where they are known already.
    """

    def __init__(self, real: FeatureRows, fake: FeatureRows, products: Gram | None = None) -> None:
        self._sides = (real, fake)
        self._rows = (torch.arange(len(real)), torch.arange(len(fake)))
        self._products = products

    @property
    def products(self) -> Gram:
        """Inner products of the rows.

        Raises:
            UserError: for features that cannot be compared.
        """
        if self._products is None:
            self._products = gram(self.real.features, self.fake.features)
        return self._products

    @cached_property
    def real(self) -> FeatureRows:
        """The N real rows."""
        return self._sides[0].take(self._rows[0])

    @cached_property
    def fake(self) -> FeatureRows:
        """The M generated rows."""
        return self._sides[1].take(self._rows[1])

    @property
    def sizes(self) -> tuple[int, int]:
        """(N, M)."""
        return len(self._rows[0]), len(self._rows[1])

    @property
    def patients(self) -> tuple[str, ...]:
        """Who is on each real row."""
        return tuple(self._sides[0].patients[row] for row in self._rows[0].tolist())

    @property
    def class_ids(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [N] and [M]."""
        return self._sides[0].class_ids[self._rows[0]], self._sides[1].class_ids[self._rows[1]]

    def keep(self, real_rows: torch.Tensor, fake_rows: torch.Tensor) -> Pair:
        """The same for a selection of rows, by index; features are copied only if a metric asks for them."""
        part = Pair.__new__(Pair)
        part._sides = self._sides
        part._rows = (self._rows[0][real_rows], self._rows[1][fake_rows])
        part._products = self.products.keep(real_rows, fake_rows)
        return part

    def of_class(self, class_id: int) -> Pair:
        """The rows of one class on both sides."""
        real, fake = (torch.nonzero(ids == class_id).flatten() for ids in self.class_ids)
        return self.keep(real, fake)


def generated_rows(features: torch.Tensor, class_ids: torch.Tensor) -> FeatureRows:
    """Features [M, D] of generated pictures, independent of each other given the model."""
    return FeatureRows(features, class_ids, tuple(str(row) for row in range(len(features))))
