"""The picture that `sample` writes and the one that the server answers are the same file."""

from __future__ import annotations

import base64
import csv
from pathlib import Path

import numpy as np
import pytest

from dfu_mlflow.config import load
from dfu_mlflow.config.sample import SampleConfig
from registry.package import RegisteredSampler
from registry.sample import picture_seed, sample

from .conftest import Running, decoded


def drawn(folder: Path, model: str, *flags: str) -> list[dict[str, str]]:
    """The manifest of a folder that `sample` filled."""
    own = ["--model", model, "--output_dir", str(folder), "--device", "cpu", "--sample.filter_copies", "false"]
    assert sample(load(SampleConfig, None, [*own, *flags])).complete
    with (folder / "manifest.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_asked_alone_the_served_file_is_samples_byte_for_byte(
    server: Running, registered: RegisteredSampler, tmp_path: Path
) -> None:
    flags = ["--sample.per_class", "3", "--sample.batch_size", "1", "--guidance_scale", "4", "--seed", "5"]
    for row in drawn(tmp_path, registered.uri, *flags):
        file = (tmp_path / row["path"]).read_bytes()
        rows, params = [{"phase": row["class"], "seed": int(row["seed"])}], {"guidance_scale": 4}
        assert server.post({"rows": rows, "params": params}, Accept="image/png").body == file
        (answer,) = server.post({"rows": rows, "params": params}).json["rows"]
        assert base64.b64decode(answer["image"]) == file


def test_a_batch_changes_rounding_alone(registered: RegisteredSampler, tmp_path: Path) -> None:
    """Sums over a batch are taken in another order; the bound is the one that the server keeps."""
    one, many = (
        np.stack([decoded((tmp_path / size / row["path"]).read_bytes()) for row in rows]).astype(int)
        for size in ("1", "64")
        for rows in [drawn(tmp_path / size, registered.uri, "--sample.per_class", "16", "--sample.batch_size", size)]
    )
    apart = np.abs(one - many)
    assert one.shape == (48, 16, 16, 3)
    assert apart.max() <= 1
    assert (apart.max(axis=-1) > 0).mean() <= 0.001


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_no_two_pictures_of_a_hundred_thousand_share_seed_or_name(seed: int) -> None:
    seeds = [[picture_seed(seed, class_id, number) for number in range(100_000)] for class_id in range(3)]
    assert len({each for own in seeds for each in own}) == 300_000
    assert 0 <= min(map(min, seeds)) <= max(map(max, seeds)) < 2**53
