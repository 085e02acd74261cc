"""Which weights learn: all of the UNet, or low-rank adapters beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from torch import nn

from dfu_mlflow.base.weight_files import read_tensors_in_turn
from dfu_mlflow.config.schema import AdapterConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.phases import phase
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
    # peft draws the A matrices from the global generator, and gives adapters the dtype of the weights beside them
    with torch.random.fork_rng(devices=[]), _as_float32(unet, config):
        torch.manual_seed(derive_seed(seed, "adapter"))
        try:
            unet.add_adapter(lora_config(config), adapter_name=ADAPTER)  # type: ignore[operator]
        except ValueError as error:
            names = str(error).splitlines()[0]
            raise UserError(f"--adapter.targets {list(config.targets)} fits no module of the UNet: {names}") from None
    return {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}


def load_weights(unet: nn.Module, config: AdapterConfig, file: Path) -> None:
    """Give a base's UNet the fine-tuned weights of a safetensors file; nothing is trainable afterwards.

    Raises:
        UserError: when the file is missing or holds the weights of another model.
    """
    weights = attach(unet, config, seed=0)
    try:
        with torch.no_grad():
            copy_from_file(weights, file)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{file} does not hold this model's weights: {' '.join(str(error).split())[:200]}") from None
    unet.requires_grad_(False).eval()


def copy_from_file(weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Copy the tensors of a safetensors file into weights by name, one after the other.

    Raises:
        KeyError: for a weight that the file lacks.
        RuntimeError: for one of another shape.
    """
    missing = set(weights)
    with phase(f"reading {file.name}", len(weights), "tensors") as progress:
        for name, value in read_tensors_in_turn(file, tuple(weights)):
            if value.shape != weights[name].shape:
                raise RuntimeError(f"{name} is {tuple(value.shape)}, not {tuple(weights[name].shape)}")
            weights[name].copy_(value)
            missing.discard(name)
            progress.advance()
    if missing:
        raise KeyError(f"{len(missing)} tensors are missing, such as {min(missing)}")


@contextmanager
def _as_float32(unet: nn.Module, config: AdapterConfig) -> Iterator[None]:
    """Inside the block the matrices have float32's dtype, their shapes, and no memory: nothing reads their values."""
    halved = [each for each in unet.modules() if isinstance(each, nn.Linear) and each.weight.dtype != torch.float32]
    if config.use_dora and halved:
        raise ValueError("a DoRA adapter measures the base's matrices: load them in float32")
    kept = [module.weight for module in halved]
    for module, weight in zip(halved, kept, strict=True):
        module.weight = nn.Parameter(torch.zeros(1, device=weight.device).expand(weight.shape), requires_grad=False)
    try:
        yield
    finally:
        for module, weight in zip(halved, kept, strict=True):
            module.weight = weight


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
