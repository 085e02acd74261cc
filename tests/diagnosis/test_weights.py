"""One fine-tune in every layout moves the base by the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from dfu_mlflow.base.load import BaseModel
from dfu_mlflow.base.origin import Origin
from dfu_mlflow.config.schema import AdapterConfig
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.diagnosis.weight_changes import measure, read_change
from dfu_mlflow.diagnosis.weights import find_weights

TARGETS = ["to_q", "to_v"]
ALPHA, RANK = 8, 4


def fresh(base: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(base / "unet")


def adapted(base: Path) -> Any:
    unet = fresh(base)
    torch.manual_seed(1)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False))
    return unet


def own(unet: Any, base: Path, folder: Path) -> None:
    weights = {name: weight.detach() for name, weight in unet.named_parameters() if "lora_" in name}
    save_file(weights, folder / "weights.safetensors")


def as_diffusers(unet: Any, base: Path, folder: Path) -> None:
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
    StableDiffusionXLPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(unet), unet_lora_adapter_metadata=config
    )


def as_kohya(unet: Any, base: Path, folder: Path) -> None:
    named = {f"unet.{name}": value for name, value in get_peft_model_state_dict(unet).items()}
    told = convert_state_dict_to_kohya(named)
    for name in [name for name in told if name.endswith(".alpha")]:
        told[name] = torch.tensor(float(ALPHA))
    save_file({name: value.contiguous() for name, value in told.items()}, folder / "lora.safetensors")


def as_peft(unet: Any, base: Path, folder: Path) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False)
    get_peft_model(fresh(base), config).save_pretrained(folder)


@pytest.mark.parametrize("write", [own, as_diffusers, as_kohya, as_peft])
def test_low_rank_layouts(write: Callable[[Any, Path, Path], None], random_base: Path, tmp_path: Path) -> None:
    unet = adapted(random_base)
    wanted = Origin(unet, AdapterConfig(method="lora", rank=RANK, alpha=ALPHA)).displacement(unet)
    write(unet, random_base, tmp_path)
    files = find_weights(tmp_path, alpha=float(ALPHA))
    found = measure(files.live, BaseModel(str(random_base)), files.alpha)
    assert found.displacement == pytest.approx(wanted, rel=1e-4)
    assert found.finite
    assert found.changed_share > 0.99


def test_full_folder_with_its_average(random_base: Path, tmp_path: Path) -> None:
    unet, start = fresh(random_base), fresh(random_base)
    for factor, name in ((1.1, "unet"), (1.01, "unet_ema")):
        with torch.no_grad():
            for weight, first in zip(unet.parameters(), start.parameters(), strict=True):
                weight.copy_(factor * first)
        unet.save_pretrained(tmp_path / name)
    files, base = find_weights(tmp_path), BaseModel(str(random_base))
    assert files.ema is not None
    assert measure(files.live, base).displacement == pytest.approx(0.1, rel=1e-4)
    assert measure(files.ema, base).displacement == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_are_measured_as_one_file_and_their_type_is_named(
    dtype: torch.dtype, random_base: Path, tmp_path: Path
) -> None:
    start, unet = BaseModel(str(random_base)), fresh(random_base).to(dtype)
    unet.save_pretrained(tmp_path / "one")
    unet.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = (measure(find_weights(tmp_path / name).live, start) for name in ("one", "many"))
    assert one == many
    assert one.dtype == str(dtype).removeprefix("torch.")


def test_what_cannot_be_read_says_why(random_base: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"pickle")
    with pytest.raises(Lacking, match="no safetensors file"):
        find_weights(tmp_path)
    with pytest.raises(Lacking, match="run code"):
        find_weights(tmp_path / "weights.bin")
    (tmp_path / "lora.safetensors").write_bytes(b"not this")
    with pytest.raises(Lacking, match="cannot be read"):
        read_change(tmp_path / "lora.safetensors", BaseModel(str(random_base)))
    save_file({"lora_te1_nothing.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "odd.safetensors")
    with pytest.raises(Lacking, match=r"odd\.safetensors"):
        read_change(tmp_path / "odd.safetensors", BaseModel(str(random_base)))
