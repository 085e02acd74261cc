"""Which weights learn: all of the UNet, or low-rank adapters beside it."""

from __future__ import annotations

import torch
from peft import LoraConfig
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
    # of whole weights, where ranks have parts; DeepSpeed leaves an empty tensor beside its own
    sizes = {name: getattr(weight, "ds_numel", weight.numel()) for name, weight in unet.named_parameters()}
    return sum(sizes[name] for name in weights) / sum(sizes.values())
