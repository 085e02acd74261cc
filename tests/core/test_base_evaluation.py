"""What was seen of the untouched base is what is read back, and nothing else is taken for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dfu_mlflow import base_evaluation
from dfu_mlflow.base_evaluation import Seen, seen_before
from dfu_mlflow.evaluator import Drawn, Observation

CPU = torch.device("cpu")


def seen(quick: bool) -> Seen:
    draws = torch.Generator().manual_seed(0)
    losses = torch.rand(4, 8, generator=draws, dtype=torch.float64)
    images = torch.randint(0, 256, (6, 8, 8, 3), generator=draws, dtype=torch.uint8).numpy()
    ids, counted = torch.arange(6) % 3, torch.arange(6) < 5
    features = tuple(torch.rand(5, width, generator=draws, dtype=torch.float64) for width in (7, 3))
    full = Observation(losses, Drawn(images, ids, counted), features)
    part = Observation(losses, Drawn(images[:3], ids[:3], counted[:3]), tuple(rows[:3] for rows in features))
    return full, part if quick else None


def same(one: Observation | None, other: Observation | None) -> bool:
    if one is None or other is None:
        return one is other
    pairs = [(one.losses, other.losses), (one.drawn.class_ids, other.drawn.class_ids)]
    pairs += [(one.drawn.counted, other.drawn.counted), *zip(one.features, other.features, strict=True)]
    return np.array_equal(one.drawn.images, other.drawn.images) and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("quick", [False, True])
def test_a_slow_evaluation_is_made_once(quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_evaluation, "WORTH_S", 0.0)
    calls: list[int] = []

    def observe() -> Seen:
        calls.append(1)
        return seen(quick)

    first = seen_before(tmp_path, "these facts", CPU, observe)
    again = seen_before(tmp_path, "these facts", CPU, observe)
    assert len(calls) == 1
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    seen_before(tmp_path, "other facts", CPU, observe)
    assert len(calls) == 2
    for file in (tmp_path / "base_evaluations").iterdir():
        file.write_bytes(b"damaged")
    assert same(seen_before(tmp_path, "these facts", CPU, observe)[0], first[0])
    assert len(calls) == 3


def test_a_quick_one_is_not_kept(tmp_path: Path) -> None:
    seen_before(tmp_path, "facts", CPU, lambda: seen(True))
    assert not (tmp_path / "base_evaluations").exists()
