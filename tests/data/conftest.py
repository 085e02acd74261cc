"""Pictures made on the spot: no photograph is needed, and none is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfu_mlflow.config.schema import DataConfig

WritePicture = Callable[..., Path]
MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def write_picture() -> WritePicture:
    """`write_picture(path, seed, size=(48, 48), **options)`: a smooth random picture that differs with its seed."""

    def write(path: Path, seed: int, size: tuple[int, int] = (48, 48), **options: object) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, **options)
        return path

    return write


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """`make_config(**fields)`: a data section whose cache is the test's own."""

    def make(**fields: object) -> DataConfig:
        defaults = {"cache_dir": tmp_path / "cache", "resolution_px": 32, "root": str(tmp_path / "photographs")}
        return DataConfig.model_validate(defaults | fields)

    return make
