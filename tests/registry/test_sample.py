"""A folder of synthetic pictures from a registered model."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfu_mlflow.errors import UserError
from dfu_mlflow.sampling import Sampler
from registry.package import RegisteredSampler
from registry.sample import CountSection, SampleConfig, sample


def config(folder: Path, **fields: object) -> SampleConfig:
    return SampleConfig.model_validate({"output_dir": folder, "sample": CountSection(per_class=2), **fields})


def test_folder_is_balanced_and_every_picture_can_be_drawn_again(
    registered: RegisteredSampler, bundle: Path, tmp_path: Path
) -> None:
    manifest = sample(config(tmp_path, num_inference_steps=2))
    with manifest.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["I", "I", "P", "P", "R", "R"]
    assert {row["model"] for row in rows} == {f"{registered.name}/{registered.version}"}
    assert len({row["seed"] for row in rows}) == 6
    again = Sampler.load(bundle, "cpu").draw(
        [row["class"] for row in rows], [int(row["seed"]) for row in rows], num_inference_steps=2
    )
    for row, expected in zip(rows, again, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / row["path"])), expected)


@pytest.mark.usefixtures("registered")
def test_a_folder_with_samples_is_not_mixed_with_others(tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").touch()
    with pytest.raises(UserError, match="--output_dir"):
        sample(config(tmp_path))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("model", ["dfu-sampler", "models:/dfu-sampler@no", "models:/dfu-sampler/99", "models:/x/1"])
def test_what_is_not_registered_is_told(model: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--model {model}") as caught:
        sample(config(tmp_path / "new", model=model))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
