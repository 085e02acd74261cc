"""How far full fine-tuning has gone is measured against the base's own files."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from dfu_mlflow.base.adapters import attach
from dfu_mlflow.base.origin import Origin
from dfu_mlflow.config.schema import AdapterConfig

FULL = AdapterConfig(method="full")


def base_in(folder: Path, base: Path, shard_size: str) -> Any:
    UNet2DConditionModel.from_pretrained(base / "unet").save_pretrained(folder / "unet", max_shard_size=shard_size)
    return UNet2DConditionModel.from_pretrained(folder / "unet")


@torch.no_grad()
def moved(unet: Any) -> float:
    """Move every weight a little; how far, by plain arithmetic."""
    draws = torch.Generator().manual_seed(0)
    squares, total = 0.0, 0.0
    for weight in unet.parameters():
        step = 1e-3 * torch.randn(weight.shape, generator=draws)
        total += float(weight.double().square().sum())
        squares += float(((weight + step).double() - weight.double()).square().sum())
        weight += step
    return math.sqrt(squares / total)


@pytest.mark.parametrize("shard_size", ["5GB", "1MB"])
def test_reads_the_base_from_its_files(shard_size: str, random_base: Path, tmp_path: Path) -> None:
    unet = base_in(tmp_path, random_base, shard_size)
    assert (len(list((tmp_path / "unet").glob("*.safetensors"))) > 1) == (shard_size == "1MB")
    attach(unet, FULL, seed=0)
    origin = Origin(unet, FULL)
    assert origin.displacement(unet) == 0.0
    assert not origin._copies
    wanted = moved(unet)
    assert origin.displacement(unet) == pytest.approx(wanted, rel=1e-6)


def test_a_file_may_hold_more_than_the_network_takes(random_base: Path, tmp_path: Path) -> None:
    base_in(tmp_path, random_base, "5GB")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "extra.thing": torch.ones(3)}, file, {"format": "pt"})
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    attach(unet, FULL, seed=0)
    origin = Origin(unet, FULL)
    wanted = moved(unet)
    assert origin.displacement(unet) == pytest.approx(wanted, rel=1e-6)


def test_copies_a_base_that_came_from_no_files(random_base: Path) -> None:
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(random_base, subfolder="unet"))
    attach(unet, FULL, seed=0)
    origin = Origin(unet, FULL)
    wanted = moved(unet)
    assert origin.displacement(unet) == pytest.approx(wanted, rel=1e-6)


def test_a_base_that_is_deleted_meanwhile_costs_the_figure_alone(
    random_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unet = base_in(tmp_path, random_base, "5GB")
    attach(unet, FULL, seed=0)
    origin = Origin(unet, FULL)
    shutil.rmtree(tmp_path / "unet")
    assert math.isnan(origin.displacement(unet))
    assert "files cannot be read" in caplog.text
