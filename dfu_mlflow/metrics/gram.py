"""Inner products between two sets of features: all that both distances, their intervals and floors are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dfu_mlflow.errors import UserError


@dataclass(frozen=True)
class Gram:
    """Inner products of N real rows x and M generated rows y.

    Attributes:
        real: x xᵀ, float64 [N, N].
        fake: y yᵀ, float64 [M, M].
        cross: x yᵀ, float64 [N, M].
        dimension: D, the features' width.
    """

    real: torch.Tensor
    fake: torch.Tensor
    cross: torch.Tensor
    dimension: int

    def keep(self, real_rows: torch.Tensor, fake_rows: torch.Tensor) -> Gram:
        """The same for a selection of rows (index tensors), without touching the features again."""
        return Gram(
            self.real[real_rows][:, real_rows],
            self.fake[fake_rows][:, fake_rows],
            self.cross[real_rows][:, fake_rows],
            self.dimension,
        )


def gram(real: torch.Tensor, fake: torch.Tensor) -> Gram:
    """Inner products of features real [N, D] and fake [M, D].

    Raises:
        UserError: for features that cannot be compared, see `comparable_features`.
    """
    real, fake = comparable_features(real, fake)
    return Gram(real @ real.T, fake @ fake.T, real @ fake.T, real.shape[1])


def comparable_features(real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sets as float64, checked.

    Raises:
        UserError: when the widths differ, a set has fewer than two rows, or a value is not finite.
    """
    for name, features in (("real", real), ("generated", fake)):
        if features.ndim != 2 or len(features) < 2:
            raise UserError(f"{name} features have shape {list(features.shape)}: at least 2 rows of [N, D] are needed")
        if not bool(torch.isfinite(features).all()):
            raise UserError(f"{name} features hold values that are not finite: the images or the extractor are broken")
    if real.shape[1] != fake.shape[1]:
        raise UserError(
            f"real features are {real.shape[1]} wide, generated ones {fake.shape[1]}: use one --metrics.extractor"
        )
    return real.double(), fake.double()
