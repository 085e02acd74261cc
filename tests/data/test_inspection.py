"""What is known of a file is kept under its digest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from dfu_mlflow.data import RowCache
from dfu_mlflow.data.inspection import Inspection, inspect_file, inspect_files


def same(one: Inspection, other: Inspection) -> bool:
    facts = [(item.digest, item.size_px, item.pixel_digest) for item in (one, other)]
    return facts[0] == facts[1] and np.array_equal(one.difference_hash, other.difference_hash)


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
