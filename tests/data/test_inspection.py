"""What is known of a file is kept under its digest."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dfu_mlflow.data import RowCache
from dfu_mlflow.data.inspection import Inspection, hashes_of, inspect_file, inspect_files, near_pairs


def same(one: Inspection, other: Inspection) -> bool:
    facts = [(item.digest, item.size_px, item.pixel_digest) for item in (one, other)]
    contents = [item.hashes.content for item in (one, other)]
    alike = contents == [None, None] or (None not in contents and np.array_equal(*contents))
    return facts[0] == facts[1] and alike and np.array_equal(one.hashes.whole, other.hashes.whole)


def test_a_file_is_decoded_once_and_described_the_same(write_picture: Callable[..., Path], tmp_path: Path) -> None:
    paths = [write_picture(tmp_path / f"{seed}.png", seed, size=(40 + seed, 48)) for seed in range(5)]
    broken, missing, small = tmp_path / "broken.png", tmp_path / "missing.png", tmp_path / "small.png"
    broken.write_bytes(paths[0].read_bytes()[:200])
    write_picture(small, 9, size=(20, 48))
    everything = [*paths, broken, missing, small]

    first = RowCache(tmp_path / "cache")
    cold, cold_problems = inspect_files(everything, 32, first)
    assert first.last_misses == 7  # the broken and the small one have digests, the missing one has none

    second = RowCache(tmp_path / "cache")
    warm, warm_problems = inspect_files(everything, 32, second)
    assert second.last_misses == 0
    assert list(warm) == list(cold) == paths
    for path in paths:
        alone = inspect_file(path, 32)
        assert isinstance(alone, Inspection)
        assert same(warm[path], cold[path])
        assert same(warm[path], alone)
    assert warm_problems == cold_problems
    assert [(item.path, item.kind) for item in warm_problems] == [
        (broken, "unreadable"),
        (missing, "missing file"),
        (small, "too small"),
    ]


def test_another_content_or_limit_is_looked_at_anew(write_picture: Callable[..., Path], tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", 1, size=(40, 40))
    cache = RowCache(tmp_path / "cache")
    before = inspect_files([path], 32, cache)[0][path]
    write_picture(path, 2, size=(41, 40))
    after = inspect_files([path], 32, cache)[0][path]
    assert (before.size_px, after.size_px) == ((40, 40), (41, 40))
    assert before.pixel_digest != after.pixel_digest
    good, problems = inspect_files([path], 41, cache)
    assert good == {}
    assert [item.kind for item in problems] == ["too small"]


@pytest.mark.parametrize("share", [1.0, 0.3, 0.15, 0.05])
def test_pictures_on_one_background_are_not_alike(share: float) -> None:
    """Wounds cut out and put on one colour differ where the wounds do; their copies are known all the same."""
    draws = np.random.default_rng(0)
    pictures = [cut_out(draws, share) for _ in range(40)]
    hashes = [hashes_of(picture) for picture in pictures]
    assert near_pairs(hashes, [str(number) for number in range(40)]) == []
    copies = [hashes_of(as_jpeg(picture.resize((360, 360)))) for picture in pictures]
    both = near_pairs(hashes + copies, [str(number) for number in range(80)])
    assert both == [(number, number + 40) for number in range(40)]


def test_a_copy_whose_background_is_no_longer_plain_is_known() -> None:
    """A studio's light falls off towards one side, and brightening makes more of it."""
    draws = np.random.default_rng(0)
    fall = np.linspace(-11.5, 11.5, 512)[None, :, None]
    pictures = [
        Image.fromarray((np.asarray(cut_out(draws, 0.3)) + 60 + fall).clip(0, 255).astype(np.uint8)) for _ in range(40)
    ]
    hashes = [hashes_of(picture) for picture in pictures]
    copies = [hashes_of(picture.point(lambda level: min(255, round(1.15 * level)))) for picture in pictures]
    assert all(item.content is not None for item in hashes)
    assert all(item.content is None for item in copies)
    pairs = near_pairs(hashes + copies, [str(number) for number in range(80)])
    assert {(number, number + 40) for number in range(40)} <= set(pairs)


def cut_out(draws: np.random.Generator, share: float) -> Image.Image:
    """512 px of one colour with a round, mottled wound on a share of them."""
    edge = int(512 * share**0.5)
    mottled = Image.fromarray(draws.integers(40, 220, (6, 6, 3), dtype=np.uint8)).resize((edge, edge))
    mask = Image.new("L", (edge, edge), 0)
    ImageDraw.Draw(mask).ellipse((0, 0, edge - 1, edge - 1), fill=255)
    picture = Image.new("RGB", (512, 512), (12, 60, 30))
    left, top = draws.integers(0, 512 - edge + 1, 2).tolist()
    picture.paste(mottled, (left, top), mask)
    return picture


def as_jpeg(picture: Image.Image) -> Image.Image:
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=70)
    return Image.open(held).convert("RGB")
