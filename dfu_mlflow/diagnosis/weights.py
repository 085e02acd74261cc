"""Fine-tuned weights in any of the usual layouts: where they lie, and what their tensors are called.

Layouts: a checkpoint of this project, a diffusers UNet folder (with `unet_ema` beside it), a LoRA file as peft,
diffusers or kohya's scripts write it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.documents import read_document

LIVE_NAMES = (
    "weights.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.bf16.safetensors",
    "diffusion_pytorch_model.safetensors.index.bf16.json",
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
)
PEFT_PREFIX = "base_model.model."
KOHYA_PREFIX = "lora_unet_"
OWN_LORA = ".lora_A.default.weight"
SHORT_NAMES: Mapping[str, str] = MappingProxyType({"F32": "float32", "BF16": "bfloat16", "F16": "float16"})
"""A type as safetensors' headers spell it -> torch's name."""


@dataclass(frozen=True)
class WeightFiles:
    """Where weights lie.

    Attributes:
        live: file or shard index of the weights as the last step left them.
        ema: of their average, or None.
        alpha: LoRA's scale numerator as the configuration says it, None where the file says it or it is the rank.
    """

    live: Path
    ema: Path | None = None
    alpha: float | None = None


@dataclass(frozen=True, eq=False)
class LowRank:
    """What LoRA adds to one layer: scale * up * down.

    Attributes:
        down: [r, I], of a convolution [r, I, kh, kw].
        up: [O, r], of a convolution [O, r, 1, 1].
        scale: alpha / r.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def change(self) -> torch.Tensor:
        """Of the layer's weight, float32 in its shape."""
        shape = (self.up.shape[0], *self.down.shape[1:])
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1)).reshape(shape)


def find_weights(path: Path, alpha: float | None = None) -> WeightFiles:
    """Find live and averaged weights below a folder, or take the file.

    Raises:
        Lacking: for a path that holds none that can be read.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise Lacking(f"{path.name} is no safetensors file: convert it, other formats can run code when opened")
        return WeightFiles(path, None, alpha)
    for folder in (path, path / "unet", path / "unet_lora"):
        live = next((folder / name for name in LIVE_NAMES if (folder / name).is_file()), None)
        if live is not None:
            return WeightFiles(live, _average_beside(live), alpha)
    loose = sorted(path.glob("*.safetensors"))
    if len(loose) == 1:
        return WeightFiles(loose[0], None, alpha)
    found = f"{len(loose)} safetensors files" if loose else "no safetensors file"
    raise Lacking(
        f"{path} holds {found}: give a checkpoint, a diffusers folder with unet/, or one LoRA file (safetensors)"
    )


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, or of the shards that an index names.

    Raises:
        Lacking: when it cannot be read.
    """
    try:
        shards = [load_file(shard) for shard in shards_of(file)]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise Lacking(f"{file.name} cannot be read: {' '.join(str(error).split())[:200]}") from None
    return {name: value for shard in shards for name, value in shard.items()}


def _average_beside(live: Path) -> Path | None:
    for candidate in (
        live.parent / "ema.safetensors",
        live.parent.parent / "unet_ema" / live.name,
        live.parent / "unet_ema" / live.name,
    ):
        if candidate.is_file() and _names(candidate):
            return candidate
    return None


def _names(file: Path) -> list[str]:
    if file.suffix == ".json":
        return ["sharded"]
    try:
        with safe_open(file, framework="pt") as content:
            return list(content.keys())
    except (OSError, SafetensorError):
        return []


def shards_of(file: Path) -> list[Path]:
    """The file itself, or those that an index names."""
    if file.suffix != ".json":
        return [file]
    index = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
    return [file.parent / name for name in sorted(set(index.values()))]


def low_rank_layers(file: Path, unet: Any, alpha: float | None) -> dict[str, LowRank]:
    """Layer's name -> its LoRA, in any of the usual namings.

    Args:
        unet: of the base's architecture; shapes are enough.
        alpha: scale numerator, see `WeightFiles`.

    Raises:
        Lacking: for a file that cannot be read, or is no LoRA that adds up.
    """
    stored: Mapping[str, torch.Tensor] = read_tensors(file)
    if any("magnitude" in name or "dora_scale" in name for name in stored):
        raise Lacking(f"{file.name} is a DoRA: its magnitudes do not add up to a change of the base's weights")
    stored, scales = _peft_names(file, stored, unet)
    found = {}
    for name, down in stored.items():
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removesuffix(".lora_A.weight")
        up = stored.get(f"{layer}.lora_B.weight")
        if up is None:
            raise Lacking(f"{file.name} holds half of an adapter: {layer} has no second matrix")
        rank = down.shape[0]
        found[layer] = LowRank(down, up, scales.get(layer, rank if alpha is None else alpha) / rank)
    return found


def _peft_names(
    file: Path, stored: Mapping[str, torch.Tensor], unet: Any
) -> tuple[Mapping[str, torch.Tensor], dict[str, float]]:
    """`LAYER.lora_A.weight` and `LAYER.lora_B.weight`, with the scale numerator of each layer that has its own."""
    if any(name.endswith(OWN_LORA) for name in stored):
        return {name.replace(".default.", "."): value for name, value in stored.items()}, {}
    if any(name.startswith(PEFT_PREFIX) for name in stored):
        plain = {name.removeprefix(PEFT_PREFIX).removeprefix("unet."): value for name, value in stored.items()}
        told = _adapter_alpha(file)
        layers = {name.removesuffix(".lora_A.weight") for name in plain}
        return plain, {} if told is None else dict.fromkeys(layers, told)
    if any(name.startswith(KOHYA_PREFIX) for name in stored):
        return _from_kohya(file, stored, unet)
    try:
        converted, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(stored), unet_config=unet.config)[:2]
    except (ValueError, KeyError, RuntimeError, IndexError) as error:
        raise Lacking(f"{file.name} is a LoRA that cannot be read: {' '.join(str(error).split())[:200]}") from None
    plain = {_renamed(name).removeprefix("unet."): value for name, value in converted.items() if name[:5] == "unet."}
    told = _header_alpha(file)
    scales = {} if told is None else {name.removesuffix(".lora_A.weight"): told for name in plain}
    scales |= {name.removeprefix("unet.").removesuffix(".alpha"): float(each) for name, each in (alphas or {}).items()}
    return plain, scales


def _from_kohya(
    file: Path, stored: Mapping[str, torch.Tensor], unet: Any
) -> tuple[Mapping[str, torch.Tensor], dict[str, float]]:
    """`lora_unet_LAYER_WITH_UNDERSCORES.lora_down.weight`, blocks numbered as Stability's code or as diffusers does."""
    if any("_input_blocks_" in name or "_middle_block_" in name for name in stored):
        try:
            stored = _maybe_map_sgm_blocks_to_diffusers(dict(stored), unet.config)
        except (ValueError, KeyError, IndexError) as error:
            raise Lacking(f"{file.name} numbers its blocks in an unknown way: {error}") from None
    layers = {KOHYA_PREFIX + name.replace(".", "_"): name for name, _ in unet.named_modules()}
    plain: dict[str, torch.Tensor] = {}
    scales: dict[str, float] = {}
    for name, value in stored.items():
        layer, _, kind = name.partition(".")
        if not layer.startswith(KOHYA_PREFIX):
            continue  # a text encoder's
        if layer not in layers:
            raise Lacking(f"{file.name} does not fit the base: it has no layer {layer}")
        if kind == "alpha":
            scales[layers[layer]] = float(value)
        else:
            plain[_renamed(f"{layers[layer]}.{kind}")] = value
    return plain, scales


def _renamed(name: str) -> str:
    """Older names of the two matrices."""
    for old, new in ((".lora.down.", ".lora_A."), (".lora.up.", ".lora_B."), (".lora_down.", ".lora_A.")):
        name = name.replace(old, new)
    return name.replace(".lora_up.", ".lora_B.")


def _header_alpha(file: Path) -> float | None:
    """`lora_alpha` of the UNet's adapter in the metadata that diffusers writes into the file."""
    with safe_open(file, framework="pt") as content:
        told = (content.metadata() or {}).get("lora_adapter_metadata")
    try:
        return float(json.loads(told)["unet.lora_alpha"]) if told else None
    except (ValueError, KeyError, TypeError):
        return None


def _adapter_alpha(file: Path) -> float | None:
    """`lora_alpha` of peft's `adapter_config.json` beside the file."""
    beside = file.with_name("adapter_config.json")
    if not beside.is_file():
        return None
    try:
        return float(json.loads(beside.read_text(encoding="utf-8"))["lora_alpha"])
    except (ValueError, KeyError, TypeError):
        raise Lacking(f"{beside.name} does not say lora_alpha") from None


def checkpoint_updates(folder: Path) -> int | None:
    """Optimizer steps of a checkpoint of this project, None for any other folder."""
    return (
        int(read_document(folder / "state.json", "checkpoint")["step"]) if (folder / "state.json").is_file() else None
    )
