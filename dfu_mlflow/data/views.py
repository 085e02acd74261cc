"""What training and evaluation see of a record: geometry first, pixels only when they are needed.

A `Plan` is drawn from (seed, record, index) without opening the file, so a warm cache decodes nothing.

Geometry of a picture with a bounding box: a margin is drawn, uniform in [box_margin_min, box_margin_max] of the box's
longer side, and added on each side; the square region around the box's centre is shifted inside the picture, and only
where the picture is too small for it is the picture continued by reflection. Without a box the region is the picture.
The region is resized (Lanczos, antialiased) until its shorter side is `resolution_px`, and a square is cut from it.

SDXL's micro-conditioning (Podell et al. 2023, section 2.2) is kept true to the pixels: `original_size` is the region
before resizing, and `crop_top_left` counts in the resized region *as it is shown*, that is after flipping: a cut at
the left edge that is then mirrored is reported as a cut at the right edge.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from dfu_mlflow.config.schema import DataConfig
from dfu_mlflow.data.images import Pixels, load_rgb
from dfu_mlflow.runtime import derive_seed
from dfu_mlflow.types import Box, Record, View

RESAMPLING = "pillow-lanczos-2"
"""Part of every key: change it when the same plan would give other pixels."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides the pixels of a view, given the file.

    Attributes:
        region: (left, top, right, bottom) in source pixels; may reach outside, where the picture is reflected.
        resized_px: (height, width) of the region after resizing.
        crop: (top, left) of the square in the resized region, before flipping.
        flips: (horizontal, vertical).
        jitter: factors of brightness, contrast and saturation.
        resolution_px: side of the square.
    """

    region: Box
    resized_px: tuple[int, int]
    crop: tuple[int, int]
    flips: tuple[bool, bool]
    jitter: tuple[float, float, float]
    resolution_px: int

    @property
    def original_size_px(self) -> tuple[int, int]:
        """(height, width) of the region."""
        left, top, right, bottom = self.region
        return bottom - top, right - left

    @property
    def crop_top_left_px(self) -> tuple[int, int]:
        """(top, left) of the crop in the resized region as it is shown, after flipping."""
        (height, width), (top, left), side = self.resized_px, self.crop, self.resolution_px
        horizontal, vertical = self.flips
        return (height - side - top if vertical else top, width - side - left if horizontal else left)

    def key(self, record: Record) -> str:
        """SHA-256 over the file's digest, the box and this plan, hexadecimal."""
        parts = {"digest": record.digest, "box": record.box, "resampling": RESAMPLING, **asdict(self)}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Draws:
    """Uniform numbers in [0, 1), one for each choice: switching one option on leaves the others' draws alone."""

    margin: float = 0.5
    crop: tuple[float, float] = (0.5, 0.5)
    flips: tuple[float, float] = (1.0, 1.0)
    jitter: tuple[float, float, float] = (0.5, 0.5, 0.5)


def plan_view(record: Record, config: DataConfig, seed: int, index: int) -> Plan:
    """Draw the geometry and colour of training view `index`; a function of its arguments alone."""
    generator = np.random.default_rng(derive_seed(seed, f"view:{record.digest}:{record.box}", index))
    draws = [float(value) for value in generator.random(8)]
    crop = (draws[1], draws[2]) if config.crop == "random" else (0.5, 0.5)
    flips = (draws[3] if config.horizontal_flip else 1.0, draws[4] if config.vertical_flip else 1.0)
    return _plan(record, config, _Draws(draws[0], crop, flips, (draws[5], draws[6], draws[7])))


def plan_evaluation_view(record: Record, config: DataConfig) -> Plan:
    """The one view of a held-out record: middle margin, central crop, no flip, colours untouched."""
    return _plan(record, config, _Draws())


def render(plan: Plan, source: Pixels) -> Pixels:
    """Cut a planned view out of its decoded picture [H, W, 3]; returns uint8 [resolution_px, resolution_px, 3]."""
    region = Image.fromarray(_cut(source, plan.region))
    height, width = plan.resized_px
    (top, left), side = plan.crop, plan.resolution_px
    image = region.resize((width, height), Image.Resampling.LANCZOS)
    image = image.crop((left, top, left + side, top + side))
    if plan.flips[0]:
        image = ImageOps.mirror(image)
    if plan.flips[1]:
        image = ImageOps.flip(image)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhancer, factor in zip(enhancers, plan.jitter, strict=True):
        if factor != 1.0:
            image = enhancer(image).enhance(factor)
    return np.array(image)


def view(record: Record, config: DataConfig, seed: int, index: int) -> View:
    """Training view `index` of a record.

    Raises:
        UserError: for a file that can no longer be decoded.
    """
    return _view(record, plan_view(record, config, seed, index))


def evaluation_view(record: Record, config: DataConfig) -> View:
    """The deterministic view used for held-out photographs and metrics; raises as `view` does."""
    return _view(record, plan_evaluation_view(record, config))


def _view(record: Record, plan: Plan) -> View:
    pixels = render(plan, load_rgb(record.path))
    return View(pixels, plan.original_size_px, plan.crop_top_left_px, plan.key(record))


def _plan(record: Record, config: DataConfig, draws: _Draws) -> Plan:
    side = config.resolution_px
    margin = config.box_margin_min + draws.margin * (config.box_margin_max - config.box_margin_min)
    region = _region(record, margin)
    width, height = region[2] - region[0], region[3] - region[1]
    scale = side / min(width, height)
    resized = (max(side, round(height * scale)), max(side, round(width * scale)))
    top, left = (int(draw * (length - side + 1)) for draw, length in zip(draws.crop, resized, strict=True))
    brightness, contrast, saturation = (1.0 + config.color_jitter * (2.0 * draw - 1.0) for draw in draws.jitter)
    return Plan(
        region=region,
        resized_px=resized,
        crop=(top, left),
        flips=(draws.flips[0] < 0.5, draws.flips[1] < 0.5),
        jitter=(brightness, contrast, saturation),
        resolution_px=side,
    )


def _region(record: Record, margin: float) -> Box:
    width, height = record.size_px
    if record.box is None:
        return (0, 0, width, height)
    xmin, ymin, xmax, ymax = record.box
    side = max(1, round(max(xmax - xmin, ymax - ymin) * (1.0 + 2.0 * margin)))
    left = _shift_inside(round((xmin + xmax - side) / 2), side, width)
    top = _shift_inside(round((ymin + ymax - side) / 2), side, height)
    return (left, top, left + side, top + side)


def _shift_inside(start: int, side: int, length: int) -> int:
    """Start of an interval of `side` that lies inside [0, length], or covers all of it where it cannot."""
    return max(min(0, length - side), min(start, max(0, length - side)))


def _cut(source: Pixels, region: Box) -> Pixels:
    height, width = source.shape[:2]
    left, top, right, bottom = region
    inside = source[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
    before, after = (max(-top, 0), max(-left, 0)), (max(bottom - height, 0), max(right - width, 0))
    if not any((*before, *after)):
        return inside
    return np.pad(inside, ((before[0], after[0]), (before[1], after[1]), (0, 0)), mode="reflect")
