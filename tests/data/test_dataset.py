"""Latents: what a change of picture, box, weights or order does to the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfu_mlflow.config.schema import DataConfig
from dfu_mlflow.data import (
    RowCache,
    encode_evaluation_latents,
    encode_latents,
    evaluation_pixels,
    evaluation_view,
    view,
)
from dfu_mlflow.errors import UserError
from dfu_mlflow.runtime import file_digest
from dfu_mlflow.types import Record


class PoolingEncoder:
    """A real, exact encoder: cell means and deviations; its identity is its weight."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.identity = f"pool-{weight}"
        self.encoded = 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.dtype == torch.uint8
        self.encoded += len(pixels)
        cells = pixels.float().permute(0, 3, 1, 2).unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
        return torch.cat([cells.mean(-1), cells.std(-1)], 1) * self.weight


@pytest.fixture
def records(tmp_path: Path, write_picture: Callable[..., Path]) -> list[Record]:
    labels = "IPRPI"
    found = []
    for number, label in enumerate(labels):
        path = write_picture(tmp_path / "photographs" / f"{number}.png", number, (60, 40))
        found.append(Record(path, label, str(number), file_digest(path), (60, 40), (10, 8, 40, 30)))
    return found


def encode(
    records: list[Record], config: DataConfig, encoder: PoolingEncoder, seed: int = 0
) -> tuple[torch.Tensor, int]:
    """Moments, and how many views had to be encoded."""
    before = encoder.encoded
    cache = RowCache(config.cache_dir or Path())
    latents = encode_latents(records, config, seed, cache, encoder)
    assert cache.last_misses == encoder.encoded - before
    return latents.moments[:], cache.last_misses


def test_rows_are_what_the_encoder_says_of_each_view(
    records: list[Record], make_config: Callable[..., DataConfig]
) -> None:
    config = make_config(views_per_image=3, horizontal_flip=True, color_jitter=0.2)
    latents = encode_latents(records, config, 5, RowCache(config.cache_dir or Path()), PoolingEncoder())
    assert latents.classes == ("I", "P", "R")
    assert latents.class_ids.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [1] * 3 + [0] * 3
    assert latents.moments.shape == (15, 6, 8, 8)
    for row, (record, index) in enumerate((record, index) for record in records for index in range(3)):
        seen = view(record, config, 5, index)
        pixels = torch.from_numpy(seen.pixels)[None]
        assert torch.equal(latents.moments[:][row], PoolingEncoder()(pixels)[0])
        assert latents.time_ids[row].tolist() == [*seen.original_size_px, *seen.crop_top_left_px, 32, 32]
        assert latents.names[row] == record.name


def test_a_warm_cache_opens_no_file(records: list[Record], make_config: Callable[..., DataConfig]) -> None:
    config, encoder = make_config(views_per_image=2), PoolingEncoder()
    moments, misses = encode(records, config, encoder)
    assert misses == 10
    for record in records:
        record.path.unlink()
    again, misses = encode(records, config, encoder)
    assert misses == 0
    assert torch.equal(again, moments)


def test_what_misses_the_cache(records: list[Record], make_config: Callable[..., DataConfig]) -> None:
    config, encoder = make_config(), PoolingEncoder()
    encode(records, config, encoder)
    pixels = np.array(Image.open(records[0].path))
    pixels[20, 20, 0] ^= 1
    Image.fromarray(pixels).save(records[0].path)
    changed = [replace(records[0], digest=file_digest(records[0].path)), *records[1:]]
    assert encode(changed, config, encoder)[1] == 1
    boxed = [*records[:2], replace(records[2], box=(10, 8, 40, 31)), *records[3:]]
    assert encode(boxed, config, encoder)[1] == 1
    assert encode(records, config, PoolingEncoder(1.001))[1] == 5
    assert encode(records, config.model_copy(update={"resolution_px": 40}), encoder)[1] == 5
    assert encode(records, config, encoder, seed=1)[1] == 5  # other margins


def test_what_does_not_miss_the_cache(
    tmp_path: Path, records: list[Record], make_config: Callable[..., DataConfig]
) -> None:
    config, encoder = make_config(), PoolingEncoder()
    moments, _ = encode(records, config, encoder)
    backwards, misses = encode(records[::-1], config, encoder)
    assert misses == 0
    assert torch.equal(backwards, moments.flip(0))
    moved = [replace(item, path=item.path.rename(tmp_path / f"moved-{item.path.name}")) for item in records]
    assert encode(moved, config, encoder)[1] == 0
    relabelled = [replace(item, label="R", patient="x") for item in records]
    assert encode(relabelled, config, encoder)[1] == 0
    other = config.model_copy(update={"validation_fraction": 0.5, "min_side_px": 8, "group_by": "none"})
    assert encode(records, other, encoder)[1] == 0
    assert encode(moved, config.model_copy(update={"views_per_image": 2}), encoder)[1] == 5  # the second views only


def test_held_out_latents_and_pixels_show_the_evaluation_view(
    records: list[Record], make_config: Callable[..., DataConfig]
) -> None:
    config = make_config(horizontal_flip=True, color_jitter=0.3, views_per_image=4)
    pixels = evaluation_pixels(records, config)
    assert pixels.dtype == torch.uint8
    for row, record in zip(pixels, records, strict=True):
        np.testing.assert_array_equal(row.numpy(), evaluation_view(record, config).pixels)
    cache = RowCache(config.cache_dir or Path())
    latents = encode_evaluation_latents(records, config, cache, PoolingEncoder())
    assert torch.equal(latents.moments[:], PoolingEncoder()(pixels))
    assert evaluation_pixels([], config).shape == (0, 32, 32, 3)


def test_class_ids_of_a_part_count_the_classes_they_are_told(
    records: list[Record], make_config: Callable[..., DataConfig]
) -> None:
    config = make_config()
    part = [record for record in records if record.label == max(each.label for each in records)]
    cache, classes = RowCache(config.cache_dir or Path()), ("none", *sorted({each.label for each in records}))
    latents = encode_evaluation_latents(part, config, cache, PoolingEncoder(), classes)
    assert latents.class_ids.tolist() == [len(classes) - 1] * len(part)
    assert latents.classes == classes


def test_non_finite_latents_are_refused_and_not_cached(
    records: list[Record], make_config: Callable[..., DataConfig]
) -> None:
    config = make_config()
    with pytest.raises(UserError, match=r"not finite for 0\.png\[10,8,40,30\]"):
        encode(records, config, PoolingEncoder(float("inf")))
    assert not list((config.cache_dir or Path()).rglob("*.safetensors"))


def test_a_file_that_vanished_is_named(records: list[Record], make_config: Callable[..., DataConfig]) -> None:
    records[3].path.unlink()
    with pytest.raises(UserError, match=r"3\.png cannot be read"):
        evaluation_pixels(records, make_config())
