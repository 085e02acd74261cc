"""Which rows and which randomness each training step gets: a pure function of (seed, epoch, step)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.data import epoch_order
from dfu_mlflow.errors import UserError
from dfu_mlflow.objective import draw
from dfu_mlflow.runtime import move
from dfu_mlflow.types import Batch, Latents


class Batches:
    """Deals out cached latents.

    Args:
        latents: the training rows.
        scaling_factor: what the autoencoder's latents are multiplied by.
        config: batch size, accumulation, steps an epoch, class balance, dropout, noise offset and seed.
        rank, ranks: which share of each micro-batch is dealt out here, of how many equal ones.

    Raises:
        UserError: for a batch size that the ranks cannot share equally.
    """

    def __init__(
        self, latents: Latents, scaling_factor: float, config: RunConfig, rank: int = 0, ranks: int = 1
    ) -> None:
        if config.train.batch_size % ranks:
            raise UserError(
                f"--train.batch_size {config.train.batch_size} cannot be shared equally by {ranks} processes: "
                f"take {math.ceil(config.train.batch_size / ranks) * ranks}"
            )
        self.latents = latents
        self.scaling_factor = scaling_factor
        self.config = config
        self.rank, self.share = rank, config.train.batch_size // ranks
        self.steps_per_epoch = steps_per_epoch(config, len(latents))
        self._order: tuple[int, np.ndarray] | None = None

    def of_step(self, epoch: int, position: int) -> Iterator[Batch]:
        """This rank's share of the micro-batches of the `position`-th step (from 0) of an epoch (from 1)."""
        size, parts = self.config.train.batch_size, self.config.train.gradient_accumulation_steps
        count = self.steps_per_epoch * size * parts
        rows = self._epoch_rows(epoch, count)
        for micro in range(parts):
            first = (position * parts + micro) * size + self.rank * self.share
            offset = (epoch - 1) * count
            last = first + self.share
            yield self._batch(rows[first:last], range(offset + first, offset + last))

    def _epoch_rows(self, epoch: int, count: int) -> np.ndarray:
        """The epoch's order, worked out once an epoch: it is as long as the epoch, a step is not."""
        if self._order is None or self._order[0] != epoch:
            ids = self.latents.class_ids.numpy()
            rows = epoch_order(ids, count, epoch, self.config.seed, self.config.data.class_balanced)
            self._order = (epoch, rows)
        return self._order[1]

    def _batch(self, rows: np.ndarray, sample_ids: range) -> Batch:
        """Pick rows and draw their latents from the autoencoder's posterior."""
        source, index = self.latents, torch.from_numpy(rows)
        mean, deviation = source.moments[index].float().chunk(2, dim=1)
        draws = draw(
            self.config.seed, tuple(sample_ids), tuple(mean.shape[1:]), self.config.loss, self.config.prompts.dropout
        )
        return Batch(
            latents=(mean + deviation * draws.posterior) * self.scaling_factor,
            class_ids=source.class_ids[index],
            time_ids=source.time_ids[index],
            sample_ids=tuple(sample_ids),
            names=tuple(source.names[row] for row in rows),
            draws=draws,
        )


class Reader:
    """Reads batches a step ahead, and sends them to a device.

    Args:
        batches: dealt out by step.
        device: where the step computes.
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches = batches
        self.device = device
        self.ahead: tuple[tuple[int, int], list[Batch]] | None = None
        """Epoch, position and micro-batches of the step that was read last."""

    def of_step(self, epoch: int, position: int) -> list[Batch]:
        """A step's micro-batches, on the device; see `Batches.of_step`."""
        if self.ahead is None or self.ahead[0] != (epoch, position):
            self.fetch(epoch, position)
        assert self.ahead is not None
        return self.ahead[1]

    def fetch(self, epoch: int, position: int) -> None:
        """Read a step's micro-batches, and queue their way to the device."""
        batches = [on_device(batch, self.device) for batch in self.batches.of_step(epoch, position)]
        self.ahead = (epoch, position), batches


def on_device(batch: Batch, device: torch.device) -> Batch:
    """What the step reads of a batch, moved as `runtime.move` does."""
    draws = batch.draws
    return replace(
        batch,
        latents=move(batch.latents, device),
        class_ids=move(batch.class_ids, device),
        time_ids=move(batch.time_ids, device),
        draws=replace(
            draws,
            dropped=move(draws.dropped, device),
            timesteps=move(draws.timesteps, device),
            noise=move(draws.noise, device),
        ),
    )


def steps_per_epoch(config: RunConfig, rows: int) -> int:
    """Optimizer steps an epoch: as configured, or one pass over the training rows."""
    return config.train.steps_per_epoch or math.ceil(
        rows / (config.train.batch_size * config.train.gradient_accumulation_steps)
    )
