"""Validation loss on a fixed grid of images x timesteps x noise, so that two epochs differ by learning alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dfu_mlflow.conditioning import Conditioner
from dfu_mlflow.objective import TIMESTEPS, Objective
from dfu_mlflow.phases import phase
from dfu_mlflow.ranks import Ranks
from dfu_mlflow.runtime import generator, in_slices
from dfu_mlflow.types import Latents

BINS = 4
LATENT_PIXELS = 2**16
"""Of latents in one forward pass: 64 pictures of 256 px, 4 of 1,024 px."""
MAX_ROWS = 64
NORMAL_95 = 1.96


@dataclass(frozen=True)
class ValidationGrid:
    """Held-out latents, each seen at the same timesteps under the same noise in every epoch.

    Attributes:
        latents: float [M, C, h, w], scaled.
        class_ids: int64 [M].
        time_ids: float32 [M, 6].
        timesteps: int64 [T], evenly spread over the schedule, T a multiple of 4.
        seed: of the noise.
    """

    latents: torch.Tensor
    class_ids: torch.Tensor
    time_ids: torch.Tensor
    timesteps: torch.Tensor
    seed: int

    @classmethod
    def build(cls, held_out: Latents, scaling_factor: float, images: int, timesteps: int, seed: int) -> ValidationGrid:
        """Take up to `images` rows, see `grid_rows`."""
        rows = grid_rows(len(held_out), images)
        mean = held_out.moments[rows].float().chunk(2, dim=1)[0]
        spread = timesteps // BINS * BINS
        steps = ((torch.arange(spread) + 0.5) * TIMESTEPS / spread).long()
        return cls(mean * scaling_factor, held_out.class_ids[rows], held_out.time_ids[rows], steps, seed)

    def noise(self, column: int) -> torch.Tensor:
        """Noise of one timestep, [M, C, h, w]."""
        shape = self.latents.shape[1:]
        rows = [
            torch.randn(shape, generator=generator(self.seed, "validation", row, column))
            for row in range(len(self.latents))
        ]
        return torch.stack(rows)


def grid_rows(rows: int, images: int) -> torch.Tensor:
    """Which of `rows` photographs a grid of up to `images` holds: evenly over the set, which is sorted by class."""
    return torch.linspace(0, rows - 1, min(images, rows)).round().long()


def rows_at_once(latent_edge: int) -> int:
    """Photographs in one forward pass, by the side of their latents."""
    return min(MAX_ROWS, max(1, LATENT_PIXELS // latent_edge**2))


@torch.no_grad()
def validation_losses(
    unet: nn.Module,
    objective: Objective,
    conditioner: Conditioner,
    grid: ValidationGrid,
    ranks: Ranks,
) -> torch.Tensor:
    """Unweighted loss of every image at every timestep, float64 [M, T]; ranks share the timesteps out."""
    device = grid_device(unet)
    kept = torch.zeros(len(grid.latents), dtype=torch.bool)
    told = conditioner.training(grid.class_ids, kept, grid.time_ids)

    def losses_at(columns: slice) -> torch.Tensor:
        ranks.check()
        noise = grid.noise(columns.start)

        def losses_of(part: slice) -> torch.Tensor:
            latents = grid.latents[part].to(device)
            steps = grid.timesteps[columns].to(device).expand(len(latents))
            piece = type(told)(told.embeddings[part], told.pooled[part], told.time_ids[part])
            losses = objective.unweighted(unet, latents, noise[part].to(device), steps, piece).double().cpu()
            progress.advance(len(losses) * ranks.count)
            return losses

        return torch.cat(in_slices(len(noise), rows_at_once(noise.shape[-1]), losses_of))[None]

    with phase("validation loss", len(grid.timesteps) * len(grid.latents), "passes") as progress:
        return ranks.rows(len(grid.timesteps), 1, losses_at, "the validation loss").T.contiguous()


def validation_figures(losses: torch.Tensor, base: torch.Tensor | None, timesteps: torch.Tensor) -> dict[str, float]:
    """Means by timestep bin (t0 the least noise), and the change against the base, paired by image, with its interval.

    Args:
        losses, base: float64 [M, T]; base None leaves the change out.
        timesteps: int64 [T].
    """
    figures = {"loss": float(losses.mean())}
    bins = timesteps * BINS // TIMESTEPS
    for number in range(BINS):
        figures[f"loss_t{number}"] = float(losses[:, bins == number].mean())
    if base is not None:
        change = (losses - base).mean(dim=1)
        half = NORMAL_95 * float(change.std()) / len(change) ** 0.5 if len(change) > 1 else 0.0
        mean = float(change.mean())
        figures |= {"loss_change": mean, "loss_change_low": mean - half, "loss_change_high": mean + half}
    return figures


def grid_device(unet: nn.Module) -> torch.device:
    """Where the network's weights are."""
    return next(unet.parameters()).device
