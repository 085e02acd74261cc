"""One UNet takes the weights of one model after another, and is each of them to the bit."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dfu_mlflow.base.adapters import attach
from dfu_mlflow.base.load import BaseModel
from dfu_mlflow.base.shared_unet import FineTune, SharedUNet, UNetWeights
from dfu_mlflow.config.schema import AdapterConfig
from dfu_mlflow.errors import UserError

CPU = torch.device("cpu")
LORA, OTHER = AdapterConfig(method="lora", rank=4), AdapterConfig(method="lora", rank=2, targets=("to_q", "to_v"))
FULL = AdapterConfig(method="full")
DORA = AdapterConfig(method="lora", rank=2, use_dora=True)


def trained(base: Path, adapter: AdapterConfig, file: Path, seed: int) -> FineTune:
    """Weights that differ from the start in every element."""
    weights = attach(BaseModel(str(base)).unet(), adapter, seed=0)
    draws = torch.Generator().manual_seed(seed)
    save_file(
        {name: weight.detach() + 0.05 * torch.randn(weight.shape, generator=draws) for name, weight in weights.items()},
        file,
    )
    return FineTune(adapter, file)


@pytest.fixture(scope="module")
def models(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, FineTune | None]:
    folder = tmp_path_factory.mktemp("tuned")
    made: dict[str, FineTune | None] = {"base": None}
    for seed, (name, adapter) in enumerate({"lora": LORA, "other": OTHER, "full": FULL, "dora": DORA}.items()):
        made[name] = trained(random_base, adapter, folder / f"{name}.safetensors", seed)
    made["second full"] = trained(random_base, FULL, folder / "second.safetensors", 9)
    return made


def answer(unet: Any) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    noisy, prompts = torch.randn(2, 4, 16, 16, generator=draws), torch.randn(2, 77, 64, generator=draws)
    added = {"text_embeds": torch.randn(2, 24, generator=draws), "time_ids": torch.ones(2, 6)}
    with torch.inference_mode():
        found: torch.Tensor = unet(noisy, torch.tensor([10, 900]), prompts, added_cond_kwargs=added).sample
    return found


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_whatever_was_held_before_a_model_is_itself(
    random_base: Path, models: dict[str, FineTune | None], precision: str
) -> None:
    alone = {
        name: answer(SharedUNet(CPU, precision).hold(UNetWeights(BaseModel(str(random_base)), tuned)))
        for name, tuned in models.items()
    }
    assert not torch.equal(alone["base"], alone["lora"])
    shared = SharedUNet(CPU, precision)
    order = ["base", "lora", "other", "base", "full", "second full", "lora", "dora", "lora", "full", "base", "dora"]
    assert len(set(pairwise(order))) == len(order) - 1
    for name in order:
        weights = UNetWeights(BaseModel(str(random_base)), models[name])
        assert torch.equal(answer(shared.hold(weights)), alone[name]), name


def test_adapters_of_one_base_share_its_unet(random_base: Path, models: dict[str, FineTune | None]) -> None:
    shared = SharedUNet(CPU, "bf16")
    first = shared.hold(UNetWeights(BaseModel(str(random_base)), models["lora"]))
    for name in ("base", "other", "lora"):
        assert shared.hold(UNetWeights(BaseModel(str(random_base)), models[name])) is first
    held = weakref.ref(first)
    del first
    shared.hold(UNetWeights(BaseModel(str(random_base)), models["full"]))
    gc.collect()
    assert held() is None, "two were in memory"


def test_a_model_is_loaded_once_however_often_it_is_asked_for(
    random_base: Path, models: dict[str, FineTune | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, weights = SharedUNet(CPU, "no"), UNetWeights(BaseModel(str(random_base)), models["full"])
    unet = shared.hold(weights)
    monkeypatch.setattr(BaseModel, "unet", None)
    assert shared.hold(weights) is unet


def test_what_does_not_fit_leaves_nothing_half_done(
    random_base: Path, models: dict[str, FineTune | None], tmp_path: Path
) -> None:
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    base = BaseModel(str(random_base))
    shared = SharedUNet(CPU, "no")
    expected = answer(shared.hold(UNetWeights(base, models["other"])))
    for adapter in (LORA, FULL):
        with pytest.raises(UserError, match=r"odd\.safetensors does not hold this model's weights"):
            shared.hold(UNetWeights(base, FineTune(adapter, tmp_path / "odd.safetensors")))
        assert torch.equal(answer(shared.hold(UNetWeights(base, models["other"]))), expected)
