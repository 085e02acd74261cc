"""The geometry of views, checked on a picture whose pixel values are their own coordinates."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dfu_mlflow.config.schema import DataConfig
from dfu_mlflow.data import evaluation_view, view
from dfu_mlflow.data.views import plan_view
from dfu_mlflow.types import Box, Record, View


def coordinate_record(folder: Path, size: tuple[int, int], box: Box | None = None) -> Record:
    """Red is x, green is y, in units that keep a 250 px picture within 8 bits."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)[None, :]
    pixels[..., 1] = np.arange(height)[:, None]
    path = folder / f"{width}x{height}.png"
    Image.fromarray(pixels).save(path)
    return Record(path, "I", "1", "d" * 64, size, box)


def source_coordinates(seen: View, config: DataConfig, origin: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Where view columns and rows come from in the source, by the *reported* conditioning alone (no flip)."""
    scale = min(seen.original_size_px) / config.resolution_px
    positions = np.arange(config.resolution_px) + 0.5
    columns = (positions + seen.crop_top_left_px[1]) * scale - 0.5 + origin[0]
    rows = (positions + seen.crop_top_left_px[0]) * scale - 0.5 + origin[1]
    return columns, rows


def assert_shows(seen: View, columns: np.ndarray, rows: np.ndarray) -> None:
    """Red and green tell the coordinates, apart from the filter's effect at the edges."""
    inner = slice(3, -3)
    red, green = seen.pixels[..., 0].astype(float), seen.pixels[..., 1].astype(float)
    assert abs(red[:, inner] - columns[None, inner]).max() < 1.6
    assert abs(green[inner] - rows[inner, None]).max() < 1.6


@pytest.mark.parametrize("size", [(240, 160), (160, 240), (200, 200), (97, 211)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_crop_of_a_whole_picture_is_where_it_says(tmp_path: Path, size: tuple[int, int], crop: Any) -> None:
    record = coordinate_record(tmp_path, size)
    config = DataConfig(resolution_px=48, crop=crop)
    for index in range(6):
        seen = view(record, config, 3, index)
        assert seen.original_size_px == (size[1], size[0])
        assert_shows(seen, *source_coordinates(seen, config, (0, 0)))


def test_flipped_views_report_the_crop_as_it_is_shown(tmp_path: Path) -> None:
    record = coordinate_record(tmp_path, (240, 160))
    plain = DataConfig(resolution_px=48, crop="random")
    flipping = plain.model_copy(update={"horizontal_flip": True, "vertical_flip": True})
    kinds = set()
    for index in range(24):
        seen, unflipped = view(record, flipping, 3, index), view(record, plain, 3, index)
        flips = plan_view(record, flipping, 3, index).flips
        kinds.add(flips)
        pixels = unflipped.pixels[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1]
        np.testing.assert_array_equal(seen.pixels, pixels)
        resized = (48, 72)
        for axis, flipped in enumerate(reversed(flips)):
            start = unflipped.crop_top_left_px[axis]
            assert seen.crop_top_left_px[axis] == (resized[axis] - 48 - start if flipped else start)
    assert kinds == set(itertools.product([False, True], repeat=2))


@pytest.mark.parametrize("box", [(90, 70, 130, 100), (0, 0, 30, 20), (200, 130, 240, 160), (100, 0, 104, 120)])
def test_box_region_is_square_inside_and_holds_the_box(tmp_path: Path, box: Box) -> None:
    record = coordinate_record(tmp_path, (240, 160), box)
    config = DataConfig(resolution_px=40, box_margin_min=0.05, box_margin_max=0.3)
    longer = max(box[2] - box[0], box[3] - box[1])
    sides = set()
    for index in range(12):
        plan = plan_view(record, config, 0, index)
        left, top, right, bottom = plan.region
        assert right - left == bottom - top
        assert longer * 1.1 - 1 <= right - left <= min(longer * 1.6 + 1, 200)
        if right - left <= 160:
            assert left >= 0
            assert top >= 0
            assert right <= 240
            assert bottom <= 160
        assert left <= box[0]
        assert top <= box[1]
        assert right >= box[2]
        assert bottom >= box[3]
        sides.add(right - left)
        seen = view(record, config, 0, index)
        assert seen.original_size_px == (right - left, right - left)
        assert seen.crop_top_left_px == (0, 0)
        if right - left <= 160:
            assert_shows(seen, *source_coordinates(seen, config, (left, top)))
    assert len(sides) > 1


def test_region_larger_than_the_picture_is_reflected(tmp_path: Path) -> None:
    record = coordinate_record(tmp_path, (200, 60), (80, 5, 160, 55))
    config = DataConfig(resolution_px=120, box_margin_min=0.25, box_margin_max=0.25)
    plan = plan_view(record, config, 0, 0)
    left, top, right, bottom = plan.region
    assert (right - left, bottom - top) == (120, 120)
    assert top < 0 < 60 < bottom
    pixels = view(record, config, 0, 0).pixels  # 120 px shown as 120 px: nothing is resampled
    expected = np.abs(np.arange(top, bottom))
    expected = np.where(expected > 59, 118 - expected, expected)
    np.testing.assert_array_equal(pixels[:, 0, 1], expected)
    np.testing.assert_array_equal(pixels[0, :, 0], np.arange(left, right))


def test_evaluation_view_is_deterministic_and_unaltered(tmp_path: Path) -> None:
    record = coordinate_record(tmp_path, (240, 160), (90, 60, 130, 100))
    wild = DataConfig(resolution_px=40, crop="random", horizontal_flip=True, vertical_flip=True, color_jitter=0.3)
    calm = DataConfig(resolution_px=40)
    assert evaluation_view(record, wild).key == evaluation_view(record, calm).key
    assert evaluation_view(record, wild).original_size_px == (60, 60)  # 40 px with the middle margin, 0.25 a side


def test_views_differ_by_index_and_seed_and_repeat_exactly(tmp_path: Path) -> None:
    record = coordinate_record(tmp_path, (240, 160))
    config = DataConfig(resolution_px=40, crop="random", horizontal_flip=True, color_jitter=0.2)
    keys = {view(record, config, seed, index).key for seed in range(3) for index in range(5)}
    assert len(keys) == 15
    one, again = view(record, config, 1, 2), view(record, config, 1, 2)
    assert one.key == again.key
    np.testing.assert_array_equal(one.pixels, again.pixels)


def test_colour_jitter_changes_colour_within_its_bounds(tmp_path: Path) -> None:
    path = tmp_path / "flat.png"
    Image.new("RGB", (64, 64), (120, 120, 120)).save(path)  # grey: contrast and saturation leave it alone
    record = Record(path, "I", "1", "e" * 64, (64, 64))
    config = DataConfig(resolution_px=32, color_jitter=0.25)
    values = {int(view(record, config, 0, index).pixels[0, 0, 0]) for index in range(40)}
    assert min(values) >= 120 * 0.75 - 1
    assert max(values) <= 120 * 1.25 + 1
    assert max(values) - min(values) > 40


def test_key_names_everything_that_decides_the_pixels(tmp_path: Path) -> None:
    record = coordinate_record(tmp_path, (240, 160), (90, 60, 130, 100))
    config = DataConfig(resolution_px=40)
    key = plan_view(record, config, 0, 0).key(record)
    for other in (replace(record, digest="f" * 64), replace(record, box=(90, 60, 130, 101))):
        assert plan_view(other, config, 0, 0).key(other) != key
    resized = config.model_copy(update={"resolution_px": 48})
    assert plan_view(record, resized, 0, 0).key(record) != key
    renamed = replace(record, path=tmp_path / "elsewhere.png", label="P", patient="2")
    assert plan_view(renamed, config, 0, 0).key(renamed) == key
