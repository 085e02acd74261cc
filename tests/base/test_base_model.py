"""A base whose networks are loaded one at a time, in the precision they are used in, and known by their files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from dfu_mlflow.base import weight_files
from dfu_mlflow.base.adapters import attach
from dfu_mlflow.base.load import BaseModel
from dfu_mlflow.base.weight_files import FileDigests, read_tensors_in_turn
from dfu_mlflow.config.schema import AdapterConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.runtime import file_digest

UNET = Path("unet", "diffusion_pytorch_model.safetensors")


@pytest.fixture
def base(random_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_base, tmp_path / "base"))


def test_matrices_are_loaded_in_the_precision_asked_for_and_the_rest_in_float32(base: Path) -> None:
    whole, half = BaseModel(str(base)).unet(), BaseModel(str(base)).unet(torch.bfloat16)
    matrices = {f"{name}.weight" for name, module in half.named_modules() if isinstance(module, nn.Linear)}
    assert matrices
    for (name, weight), expected in zip(half.named_parameters(), whole.parameters(), strict=True):
        dtype = torch.bfloat16 if name in matrices else torch.float32
        assert weight.dtype == dtype, name
        assert torch.equal(weight, expected.to(dtype)), name
        assert not weight.requires_grad


def test_shards_and_one_file_are_the_same_network(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "GROUP_BYTES", 10_000)  # many groups, some of a single tensor
    network = UNet2DConditionModel.from_pretrained(base / "unet")
    one = BaseModel(str(base)).unet().state_dict()
    shutil.rmtree(base / "unet")
    network.save_pretrained(base / "unet", max_shard_size="100KB")
    assert len(list((base / "unet").glob("*.safetensors"))) > 1
    many = BaseModel(str(base)).unet().state_dict()
    for name, weight in network.state_dict().items():
        assert torch.equal(one[name], weight)
        assert torch.equal(many[name], weight)


def test_a_file_that_lacks_a_tensor_or_has_another_shape_is_refused(base: Path) -> None:
    weights = load_file(base / UNET)
    name = next(iter(weights))
    save_file({other: value for other, value in weights.items() if other != name}, base / UNET)
    with pytest.raises(UserError, match=f"1 of its UNet's tensors are missing, such as {name}"):
        BaseModel(str(base)).unet()
    save_file({**weights, name: torch.zeros(3, 3, 3)}, base / UNET)
    with pytest.raises(UserError, match="another shape"):
        BaseModel(str(base)).unet()


def test_text_encoders_live_inside_their_block(base: Path) -> None:
    with BaseModel(str(base)).text_encoders() as pipe:
        assert pipe.text_encoder is not None
        assert (pipe.unet, pipe.vae) == (None, None)
    assert pipe.text_encoder is None
    assert pipe.text_encoder_2 is None


def test_a_digest_is_the_files_own_and_is_remembered_until_it_changes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "SLOW_BYTES", 0)
    hashed: list[Path] = []
    original = weight_files._digest

    def counting(path: Path, size: int) -> str:
        hashed.append(path)
        return original(path, size)

    monkeypatch.setattr(weight_files, "_digest", counting)
    memory = tmp_path / "memory"
    first = BaseModel(str(base), FileDigests(memory)).digest("unet")
    assert first == file_digest(base / UNET)
    assert BaseModel(str(base), FileDigests(memory)).digest("unet") == first
    assert len(hashed) == 1, "another process would find it in the folder"
    before = (base / UNET).stat()
    weights = load_file(base / UNET)
    save_file({name: value + 1 for name, value in weights.items()}, base / UNET, {"format": "pt"})
    os.utime(base / UNET, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` and `rsync -t` leave it
    assert (base / UNET).stat().st_size == before.st_size
    assert BaseModel(str(base), FileDigests(memory)).digest("unet") == file_digest(base / UNET) != first
    copied = Path(shutil.copytree(base, tmp_path / "copied"))
    assert BaseModel(str(copied)).digest("unet") == file_digest(base / UNET), "where it lies does not matter"


def test_tensors_come_in_turn_whatever_their_size(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "GROUP_BYTES", 1)
    weights = load_file(base / UNET)
    read = {name: value.clone() for name, value in read_tensors_in_turn(base / UNET)}
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    some = sorted(weights)[:3]
    assert {name for name, _ in read_tensors_in_turn(base / UNET, some)} == set(some)


def test_adapters_start_alike_beside_matrices_of_any_precision(base: Path) -> None:
    config = AdapterConfig(method="lora", rank=4)
    started = []
    for matrices in (torch.float32, torch.bfloat16):
        unet = BaseModel(str(base)).unet(matrices)
        before = {name: weight.clone() for name, weight in unet.named_parameters()}
        weights = attach(unet, config, seed=5)
        started.append(weights)
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        after = {name.replace(".base_layer", ""): weight for name, weight in unet.named_parameters()}
        assert all(torch.equal(after[name], weight) for name, weight in before.items()), "the base is as it was"
    first, second = started
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
