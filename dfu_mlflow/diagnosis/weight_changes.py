"""How fine-tuned weights differ from the base's: measured tensor by tensor, and put into a shared UNet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from dfu_mlflow.base.load import BaseModel
from dfu_mlflow.base.published import meta_modules
from dfu_mlflow.base.weight_files import TensorReader, weight_files
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.diagnosis.weights import SHORT_NAMES, LowRank, low_rank_layers, shards_of
from dfu_mlflow.phases import phase


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


@dataclass(frozen=True, eq=False)
class LowRankChange:
    """LoRA of any trainer; satisfies `dfu_mlflow.base.shared_unet.Tuned`.

    Attributes:
        layers: layer's name -> what is added to it.
    """

    layers: dict[str, LowRank]
    _hooks: list[Any] = field(default_factory=list)

    files: tuple[Path, ...] = ()
    reads_matrices: bool = False

    def attach(self, unet: Any) -> None:
        """Let each layer answer with its adapter's answer added."""
        modules = dict(unet.named_modules())
        for name, low_rank in self.layers.items():
            module = modules[name]
            place = module.weight.device
            down, up = low_rank.down.to(place, torch.float32), low_rank.up.to(place, torch.float32)
            self._hooks.append(module.register_forward_hook(partial(_add, down, up, low_rank.scale)))

    def detach(self, unet: Any) -> None:
        """Leave the layers alone again."""
        while self._hooks:
            self._hooks.pop().remove()

    def changes(self, base: TensorReader) -> Iterator[tuple[str, torch.Tensor]]:
        """Weight's name and how it moved."""
        for layer, low_rank in self.layers.items():
            yield f"{layer}.weight", low_rank.change()


@dataclass(frozen=True, eq=False)
class WholeChange:
    """All weights of a UNet; satisfies `dfu_mlflow.base.shared_unet.Tuned`.

    Attributes:
        files: that hold them by parameter name.
    """

    files: tuple[Path, ...]
    names: tuple[str, ...]
    reads_matrices: bool = False

    def attach(self, unet: Any) -> None:
        """Nothing is added."""

    def detach(self, unet: Any) -> None:
        """Nothing was added."""

    def changes(self, base: TensorReader) -> Iterator[tuple[str, torch.Tensor]]:
        """Weight's name and how it moved, in the file's own precision."""
        now = TensorReader(self.files)
        for name in self.names:
            value = now.read(name)
            yield name, value - base.read(name).to(value.dtype)


Change = LowRankChange | WholeChange


def read_change(file: Path, base: BaseModel, alpha: float | None = None) -> Change:
    """What a file of fine-tuned weights, or the shards that an index names, make of the base's UNet.

    Args:
        alpha: LoRA's scale numerator, see `WeightFiles`.

    Raises:
        Lacking: for weights that cannot be read, or of another model.
    """
    unet: Any = meta_modules(str(base.folder))["unet"]
    shapes = {name: tuple(weight.shape) for name, weight in unet.named_parameters()}
    try:
        shards = tuple(shards_of(file))
        stored = TensorReader(shards)
        if any("lora" in name.lower() for name in stored.names()):
            return _checked(file, LowRankChange(low_rank_layers(file, unet, alpha)), shapes)
        same = tuple(name for name in shapes if name in stored.names() and stored.shape(name) == shapes[name])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise Lacking(f"{file.name} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if len(same) < len(shapes):
        raise Lacking(
            f"{file.name} does not fit the base: {len(shapes) - len(same)} of {len(shapes)} tensors are missing"
        )
    return WholeChange(shards, same)


def measure(file: Path, base: BaseModel, alpha: float | None = None) -> Movement:
    """Displacement of weights from the base's; raises as `read_change`. One tensor of each is in memory at a time."""
    change = read_change(file, base, alpha)
    start = TensorReader(weight_files(base.folder / "unet"))
    total, moved = Counter[str](), Counter[str]()
    names = [name for name, _ in meta_modules(str(base.folder))["unet"].named_parameters()]
    with phase("measuring how far the weights moved", len(names), "tensors") as progress:
        for name in names:
            total[_block(name)] += _squares(start.read(name).float())  # type: ignore[assignment]
            progress.advance()
    changed = elements = 0
    finite = True
    with phase("measuring how far the weights moved", len(names), "tensors") as progress:
        for name, difference in change.changes(start):
            finite = finite and bool(difference.isfinite().all())
            squares = _squares(difference.nan_to_num(0.0, 0.0, 0.0))
            moved[_block(name)] += squares  # type: ignore[assignment]
            if squares > 0:
                changed, elements = changed + int((difference != 0).sum()), elements + difference.numel()
            progress.advance()
    return Movement(
        displacement=(sum(moved.values()) / sum(total.values())) ** 0.5,
        by_block={block: (moved[block] / total[block]) ** 0.5 for block in total if block in moved},
        changed_share=changed / elements if elements else 0.0,
        finite=finite,
        dtype=_dtype(file),
    )


def _checked(file: Path, change: LowRankChange, shapes: dict[str, tuple[int, ...]]) -> LowRankChange:
    unknown = sorted(layer for layer in change.layers if f"{layer}.weight" not in shapes)
    if unknown or not change.layers:
        raise Lacking(
            f"{file.name} does not fit the base: it changes {', '.join(unknown[:3]) or 'nothing of its UNet'}"
        )
    return change


def _add(
    down: torch.Tensor, up: torch.Tensor, scale: float, module: nn.Module, inputs: Any, answer: torch.Tensor
) -> torch.Tensor:
    """A layer's answer with scale * up(down(input)) added, in the answer's precision."""
    (given,) = inputs
    if isinstance(module, nn.Conv2d):
        inner = F.conv2d(given.to(down.dtype), down, None, module.stride, module.padding, module.dilation)
        added = F.conv2d(inner, up)
    else:
        added = F.linear(F.linear(given.to(down.dtype), down), up)
    return answer + (scale * added).to(answer.dtype)


def _squares(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _dtype(file: Path) -> str:
    """From the headers alone: the tensors have been read once already."""
    counts = Counter[str]()
    for shard in shards_of(file):
        with safe_open(shard, framework="pt") as content:
            counts.update(content.get_slice(name).get_dtype() for name in content.keys())  # noqa: SIM118
    most = counts.most_common(1)[0][0]
    return SHORT_NAMES.get(most, most)


def _block(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("down_blocks", "up_blocks") else parts[0]
