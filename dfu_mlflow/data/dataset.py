"""Records -> what training and metrics hold in memory: latents, and the pixels of held-out pictures."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from dfu_mlflow.config.schema import DataConfig
from dfu_mlflow.data.cache import RowCache, Work
from dfu_mlflow.data.images import Pixels, load_rgb
from dfu_mlflow.data.views import Plan, plan_evaluation_view, plan_view, render
from dfu_mlflow.errors import UserError
from dfu_mlflow.types import Latents, Record

MAX_BATCH = 64
BATCH_PIXELS = 4 * 2**20
"""Pixels handed to the encoder at once: 64 pictures of 64 px, 16 of 512 px, 4 of 1,024 px."""

HELD_OUT = Work("caching latents of whole photographs")

Job = tuple[Record, Plan]


class LatentEncoder(Protocol):
    """The autoencoder's first half."""

    @property
    def identity(self) -> str:
        """What the answer depends on besides the pixels: digest of the weights and the dtype."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 2C, h, w]: mean and standard deviation of the posterior, unscaled."""


def encode_latents(
    records: Sequence[Record], config: DataConfig, seed: int, cache: RowCache, encoder: LatentEncoder
) -> Latents:
    """Latents of `config.views_per_image` training views of each record, record by record.

    With a warm cache no file is opened. `Latents.classes` are the records' own labels, sorted.

    Raises:
        UserError: for a file that can no longer be decoded, latents that are not finite, or a full disk.
    """
    views = range(config.views_per_image)
    jobs = [(record, plan_view(record, config, seed, index)) for record in records for index in views]
    return _encode(jobs, config, cache, encoder, work=Work("caching latents", "views"))


def encode_evaluation_latents(
    records: Sequence[Record],
    config: DataConfig,
    cache: RowCache,
    encoder: LatentEncoder,
    classes: tuple[str, ...] | None = None,
    mirrored: bool = False,
) -> Latents:
    """Latents of the one deterministic view of each record, for held-out pictures; raises as `encode_latents`.

    Args:
        classes: what class ids count; None takes those of the records, which a part of a side may not all have.
        mirrored: of that view with left and right exchanged.
    """
    plans = [plan_evaluation_view(record, config) for record in records]
    if mirrored:
        plans = [replace(plan, flips=(True, False)) for plan in plans]
    jobs = list(zip(records, plans, strict=True))
    return _encode(jobs, config, cache, encoder, classes)


def encoded_at_once(resolution_px: int) -> int:
    """Photographs that the autoencoder is given together."""
    return max(1, min(MAX_BATCH, BATCH_PIXELS // resolution_px**2))


def evaluation_pixels(records: Sequence[Record], config: DataConfig) -> torch.Tensor:
    """Held-out pictures as the metrics see them, uint8 [N, H, W, 3].

    Raises:
        UserError: for a file that can no longer be decoded.
    """
    if not records:
        return torch.empty((0, config.resolution_px, config.resolution_px, 3), dtype=torch.uint8)
    return _pixels([(record, plan_evaluation_view(record, config)) for record in records])


def _encode(
    jobs: Sequence[Job],
    config: DataConfig,
    cache: RowCache,
    encoder: LatentEncoder,
    classes: tuple[str, ...] | None = None,
    work: Work = HELD_OUT,
) -> Latents:
    if not jobs:
        raise UserError("there are no pictures to encode: look at --data.root and --data.classes")
    classes = classes or tuple(sorted({record.label for record, _ in jobs}))

    def compute(positions: list[int]) -> torch.Tensor:
        batch = [jobs[position] for position in positions]
        moments = encoder(_pixels(batch)).float().cpu()
        finite = moments.flatten(1).isfinite().all(1)
        if not finite.all():
            names = ", ".join(batch[int(at)][0].name for at in (~finite).nonzero()[:3])
            raise UserError(f"the autoencoder gives values that are not finite for {names}: use a wider dtype for it")
        return moments

    size = encoded_at_once(config.resolution_px)
    keys = [plan.key(record) for record, plan in jobs]
    return Latents(
        moments=cache.stored(f"latents:{encoder.identity}", keys, compute, size, work),
        class_ids=torch.tensor([classes.index(record.label) for record, _ in jobs], dtype=torch.int64),
        time_ids=torch.tensor([_time_ids(plan) for _, plan in jobs], dtype=torch.float32),
        names=tuple(record.name for record, _ in jobs),
        classes=classes,
    )


def _time_ids(plan: Plan) -> list[int]:
    return [*plan.original_size_px, *plan.crop_top_left_px, plan.resolution_px, plan.resolution_px]


def _pixels(jobs: Sequence[Job]) -> torch.Tensor:
    """Render views in threads, uint8 [N, H, W, 3]; each file is decoded once however many views are cut from it."""
    by_file: dict[str, list[int]] = defaultdict(list)
    for position, (record, _) in enumerate(jobs):
        by_file[str(record.path)].append(position)

    def render_file(positions: list[int]) -> list[tuple[int, Pixels]]:
        source = load_rgb(jobs[positions[0]][0].path)
        return [(position, render(jobs[position][1], source)) for position in positions]

    rows: list[Pixels | None] = [None] * len(jobs)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for rendered in pool.map(render_file, by_file.values()):
            for position, pixels in rendered:
                rows[position] = pixels
    return torch.from_numpy(np.stack([row for row in rows if row is not None]))
