"""Which weights learn: all of the UNet, or low-rank adapters beside it. And how far they have moved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from dfu_mlflow.config.schema import AdapterConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.runtime import derive_seed

ADAPTER = "default"

Weights = dict[str, nn.Parameter]


def attach(unet: nn.Module, config: AdapterConfig, seed: int) -> Weights:
    """Make the UNet trainable as configured and return what learns, by name. Everything else is frozen.

    Raises:
        UserError: when no module's name ends as `adapter.targets` says.
    """
    unet.requires_grad_(False)
    if config.method == "full":
        unet.requires_grad_(True)
        return dict(unet.named_parameters())
    with torch.random.fork_rng(devices=[]):  # peft draws the A matrices from the global generator
        torch.manual_seed(derive_seed(seed, "adapter"))
        try:
            unet.add_adapter(lora_config(config), adapter_name=ADAPTER)  # type: ignore[operator]
        except ValueError as error:
            names = str(error).splitlines()[0]
            raise UserError(f"--adapter.targets {list(config.targets)} fits no module of the UNet: {names}") from None
    return {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}


def store_frozen(unet: nn.Module, config: AdapterConfig) -> None:
    """Keep the matrices that do not learn in `adapter.frozen_dtype`.

    Under bf16's autocast nothing changes by it: it rounds them to bf16 before each use. Convolutions and vectors stay
    in float32: the UNet's own dtype, which sampling starts in, is that of its first convolution.
    """
    if config.frozen_dtype == "float32":
        return
    for module in unet.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.weight = nn.Parameter(module.weight.detach().to(torch.bfloat16), requires_grad=False)


def lora_config(config: AdapterConfig) -> LoraConfig:
    """The adapter in peft's words."""
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha if config.alpha is not None else config.rank,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        use_dora=config.use_dora,
        init_lora_weights=True,
    )


def trainable_fraction(unet: nn.Module, weights: Weights) -> float:
    """Trainable weights / all weights of the UNet, adapters included (the founding runs' 11.5 % counts so)."""
    sizes = {
        name: weight.numel() for name, weight in unet.named_parameters()
    }  # of whole weights, where ranks have parts
    return sum(sizes[name] for name in weights) / sum(sizes.values())


def snapshot(unet: nn.Module, config: AdapterConfig) -> dict[str, torch.Tensor]:
    """The base's weights on the CPU, to measure displacement against; LoRA needs only their norm."""
    if config.method == "full":
        return {name: weight.detach().cpu().clone() for name, weight in unet.named_parameters()}
    total = sum(_squares(weight.detach()) for name, weight in unet.named_parameters() if "lora_" not in name)
    return {"norm": torch.tensor(math.sqrt(total), dtype=torch.float64)}


@torch.no_grad()
def displacement(unet: nn.Module, base: Mapping[str, torch.Tensor]) -> float:
    """How far the effective weights have moved: ||W - W0|| / ||W0|| over the whole UNet.

    For LoRA the difference is each adapter's own scale * B A; a DoRA magnitude is not counted.
    """
    if "norm" in base:
        layers: list[Any] = [layer for layer in unet.modules() if isinstance(layer, LoraLayer)]
        return math.sqrt(sum(_squares(layer.get_delta_weight(ADAPTER)) for layer in layers)) / float(base["norm"])
    weights = dict(unet.named_parameters())
    moved = sum(_squares(weights[name].detach().cpu().double() - start.double()) for name, start in base.items())
    return math.sqrt(moved / sum(_squares(start) for start in base.values()))


def _squares(values: Any) -> float:
    return float(values.double().pow(2).sum())
