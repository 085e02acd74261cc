"""The values that travel between stages. Shapes are documented here once.

Symbols: B batch, C latent channels (4 for SDXL), H W image height and width in pixels, f the autoencoder's
downscaling factor, h = H/f, w = W/f, L tokens (77), D embedding width (2,048 for SDXL), P pooled width (1,280).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

Pipeline: TypeAlias = Any
"""A `diffusers.StableDiffusionXLPipeline`: its parts are attributes set at run time, unknown to type checkers."""

Box = tuple[int, int, int, int]
"""(xmin, ymin, xmax, ymax) in source pixels, right and bottom exclusive."""


class Rows(Protocol):
    """Rows [N, ...] that are picked by position: a tensor, or something that reads them from files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...)."""

    def __getitem__(self, wanted: torch.Tensor | slice, /) -> torch.Tensor:
        """Those at these positions, int64 [n] or a slice."""


@dataclass(frozen=True)
class Record:
    """One picture to learn from: an image file, or one bounding box of it.

    Attributes:
        path: the image file.
        label: its class.
        patient: whom it shows; records of one patient never stand on both sides of a split.
        digest: SHA-256 of the file's bytes, hexadecimal.
        size_px: (width, height) after EXIF orientation.
        box: region of interest, or None for the whole image.
    """

    path: Path
    label: str
    patient: str
    digest: str
    size_px: tuple[int, int]
    box: Box | None = None

    @property
    def name(self) -> str:
        """File name, with the box if there is one: what messages and manifests show."""
        return self.path.name if self.box is None else f"{self.path.name}[{','.join(map(str, self.box))}]"


@dataclass(frozen=True)
class Split:
    """Records divided by patient."""

    train: tuple[Record, ...]
    held_out: tuple[Record, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class labels in sorted order; a class index is a position in this tuple."""
        return tuple(sorted({record.label for record in self.train + self.held_out}))


@dataclass(frozen=True)
class View:
    """What training sees of a record: one crop, flip and colour draw.

    Attributes:
        pixels: uint8 [H, W, 3].
        original_size_px: (height, width) of the region before it was resized: SDXL's `original_size`.
        crop_top_left_px: (top, left) of the crop in the resized region: SDXL's `crops_coords_top_left`.
        key: SHA-256 over everything that decided the pixels.
    """

    pixels: np.ndarray
    original_size_px: tuple[int, int]
    crop_top_left_px: tuple[int, int]
    key: str


@dataclass(frozen=True)
class Latents:
    """Cached training material, one row a view.

    Attributes:
        moments: float [N, 2C, h, w]: mean and standard deviation of the autoencoder's posterior, unscaled; in
            memory, or in the cache's files and read when indexed.
        class_ids: int64 [N], positions in `classes`.
        time_ids: float32 [N, 6]: original height, width, crop top, left, target height, width.
        names: file (and box) of each row.
        classes: the class labels.
    """

    moments: Rows
    class_ids: torch.Tensor
    time_ids: torch.Tensor
    names: tuple[str, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return int(self.moments.shape[0])


@dataclass(frozen=True)
class Draws:
    """The random part of a micro-batch; row i depends on (seed, sample index of i) alone.

    Attributes:
        dropped: bool [B], captions to drop.
        timesteps: int64 [B].
        posterior: [B, C, h, w], standard normal, picks a latent from the autoencoder's posterior.
        noise: [B, C, h, w], standard normal plus the noise offset.
    """

    dropped: torch.Tensor
    timesteps: torch.Tensor
    posterior: torch.Tensor
    noise: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        latents: float [B, C, h, w], scaled as the UNet expects.
        class_ids: int64 [B].
        time_ids: float32 [B, 6].
        sample_ids: global sample index of each row since the start of training; every random draw depends on
            (seed, purpose, sample index) alone, so neither batch size nor rank count changes what a sample sees.
        names: file (and box) of each row, for messages.
        draws: its random part.
    """

    latents: torch.Tensor
    class_ids: torch.Tensor
    time_ids: torch.Tensor
    sample_ids: tuple[int, ...]
    names: tuple[str, ...]
    draws: Draws

    def __len__(self) -> int:
        return int(self.latents.shape[0])


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told.

    Attributes:
        embeddings: [B, L, D], penultimate layers of both text encoders side by side.
        pooled: [B, P], the second encoder's projection.
        time_ids: float32 [B, 6].
    """

    embeddings: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor


@dataclass(frozen=True)
class Estimate:
    """A figure with its uncertainty.

    Attributes:
        value: the point estimate.
        low, high: ends of the 95 % interval; None where it could not be computed (`EvalReport.notes` says why).
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class EvalReport:
    """The figures of one evaluation.

    Attributes:
        values: metric name -> estimate, e.g. `fd`, `kid`, `I/kid`, `fd_progress`.
        identity: what the figures depend on besides the model (extractor, weights' hash, resize, counts, seeds,
            protocol); figures of different identity are never compared.
        weights: `live` or `ema`.
        notes: metrics that were not computed, and why.
    """

    values: dict[str, Estimate]
    identity: str
    weights: str
    notes: dict[str, str] = field(default_factory=dict)
