"""Fine-tuned weights in any of the usual layouts -> how far each base weight has moved.

Layouts: a checkpoint of this project, a diffusers UNet folder (with `unet_ema` beside it), a LoRA file as peft,
diffusers or kohya's scripts write it.
"""

from __future__ import annotations

import json
from collections import Counter
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


@dataclass(frozen=True)
class Movement:
    """How far weights have come from the base.

    Attributes:
        displacement: ||W - W0|| / ||W0|| over the whole UNet.
        by_block: the same for each block of it.
        changed_share: of the elements of tensors that moved at all, those that differ.
        finite: whether all of them are.
        dtype: that most tensors are stored in.
    """

    displacement: float
    by_block: dict[str, float]
    changed_share: float
    finite: bool
    dtype: str


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
        shards = [load_file(shard) for shard in _shards(file)]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise Lacking(f"{file.name} cannot be read: {' '.join(str(error).split())[:200]}") from None
    return {name: value for shard in shards for name, value in shard.items()}


def changes(file: Path, unet: Any, alpha: float | None = None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Base weight's name -> (where it started, how it moved), both in the file's own precision.

    Args:
        unet: the untouched base's UNet.
        alpha: LoRA's scale numerator, see `WeightFiles`.

    Raises:
        Lacking: for weights of another model.
    """
    stored = read_tensors(file)
    start = dict(unet.named_parameters())
    if any("lora" in name.lower() for name in stored):
        moved = _low_rank(file, stored, unet, alpha)
    else:
        same = {name: value for name, value in stored.items() if name in start and value.shape == start[name].shape}
        if len(same) < len(start):
            raise Lacking(
                f"{file.name} does not fit the base: {len(start) - len(same)} of {len(start)} tensors are missing"
            )
        moved = {name: value - start[name].detach().to("cpu", value.dtype) for name, value in same.items()}
    unknown = sorted(set(moved) - set(start))
    if unknown or not moved:
        raise Lacking(
            f"{file.name} does not fit the base: it changes {', '.join(unknown[:3]) or 'nothing of its UNet'}"
        )
    return {name: (start[name].detach(), change) for name, change in moved.items()}


def measure(file: Path, unet: Any, alpha: float | None = None) -> Movement:
    """Displacement of weights from the base's; raises as `changes`."""
    total, moved = Counter[str](), Counter[str]()
    for name, weight in unet.named_parameters():
        total[_block(name)] += float(weight.detach().double().pow(2).sum())  # type: ignore[assignment]
    changed = elements = 0
    finite = True
    for name, (_, change) in changes(file, unet, alpha).items():
        finite = finite and bool(change.isfinite().all())
        squares = float(change.double().nan_to_num(0.0, 0.0, 0.0).pow(2).sum())
        moved[_block(name)] += squares  # type: ignore[assignment]
        if squares > 0:
            changed, elements = changed + int((change != 0).sum()), elements + change.numel()
    return Movement(
        displacement=(sum(moved.values()) / sum(total.values())) ** 0.5,
        by_block={block: (moved[block] / total[block]) ** 0.5 for block in total if block in moved},
        changed_share=changed / elements if elements else 0.0,
        finite=finite,
        dtype=_dtype(file),
    )


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


def _shards(file: Path) -> list[Path]:
    """The file itself, or those that an index names."""
    if file.suffix != ".json":
        return [file]
    index = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
    return [file.parent / name for name in sorted(set(index.values()))]


def _dtype(file: Path) -> str:
    """From the headers alone: the tensors have been read once already."""
    counts = Counter[str]()
    for shard in _shards(file):
        with safe_open(shard, framework="pt") as content:
            counts.update(content.get_slice(name).get_dtype() for name in content.keys())  # noqa: SIM118
    most = counts.most_common(1)[0][0]
    return SHORT_NAMES.get(most, most)


def _block(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("down_blocks", "up_blocks") else parts[0]


def _low_rank(
    file: Path, stored: Mapping[str, torch.Tensor], unet: Any, alpha: float | None
) -> dict[str, torch.Tensor]:
    """Base weight's name -> scale * B A."""
    if any("magnitude" in name or "dora_scale" in name for name in stored):
        raise Lacking(f"{file.name} is a DoRA: its magnitudes do not add up to a change of the base's weights")
    stored, scales = _peft_names(file, stored, unet)
    moved = {}
    for name, down in stored.items():
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removesuffix(".lora_A.weight")
        up = stored.get(f"{layer}.lora_B.weight")
        if up is None:
            raise Lacking(f"{file.name} holds half of an adapter: {layer} has no second matrix")
        rank = down.shape[0]
        scale = scales.get(layer, rank if alpha is None else alpha) / rank
        shape = (up.shape[0], *down.shape[1:])
        moved[f"{layer}.weight"] = scale * (up.float().flatten(1) @ down.float().flatten(1)).reshape(shape)
    return moved


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
