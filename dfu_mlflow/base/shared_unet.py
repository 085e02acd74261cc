"""One UNet on a device for several models that are looked at one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from dfu_mlflow.base.adapters import attach, load_weights
from dfu_mlflow.base.load import BaseModel
from dfu_mlflow.base.published import meta_modules
from dfu_mlflow.base.weight_files import TensorReader
from dfu_mlflow.config.schema import AdapterConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.runtime import HALF, release_memory, use_precision


class Tuned(Protocol):
    """What a fine-tune does to the base's UNet."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Weight files that hold all of the UNet; none where the base's weights stay and something is added."""

    @property
    def reads_matrices(self) -> bool:
        """Whether what is added reads the base's matrices, which are then kept in float32."""

    def attach(self, unet: Any) -> None:
        """Add it to a UNet with the base's weights."""

    def detach(self, unet: Any) -> None:
        """Take it out again."""


@dataclass(frozen=True)
class FineTune:
    """Weights that this project trained.

    Attributes:
        adapter: how.
        file: safetensors file of what learned, by parameter name.
    """

    adapter: AdapterConfig
    file: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """Of a full fine-tune, which trains every weight."""
        return (self.file,) if self.adapter.method == "full" else ()

    @property
    def reads_matrices(self) -> bool:
        """DoRA measures the base's matrices."""
        return self.adapter.method == "lora" and self.adapter.use_dora

    def check(self, base: BaseModel) -> None:
        """Look into the file's head, so that what does not fit is told before anything is drawn.

        Raises:
            UserError: when the file is missing or holds the weights of another model.
        """
        unet: Any = meta_modules(str(base.folder))["unet"]
        with torch.device("meta"):
            wanted = attach(unet, self.adapter, seed=0)
        try:
            stored = TensorReader((self.file,))
            odd = [name for name, weight in wanted.items() if stored.shape(name) != tuple(weight.shape)]
        except (OSError, SafetensorError, KeyError) as error:
            odd = [" ".join(str(error).split())[:200]]
        if odd:
            raise UserError(f"{self.file} does not hold this model's weights: {odd[0]}")

    def attach(self, unet: Any) -> None:
        """Add the adapter; raises as `load_weights`."""
        load_weights(unet, self.adapter, self.file)

    def detach(self, unet: Any) -> None:
        """Take it out."""
        unet.unload_lora()


@dataclass(frozen=True)
class UNetWeights:
    """Which weights a UNet is to have.

    Attributes:
        base: whose architecture it has, and whose weights where none were trained.
        tuned: what was trained on it; None is the untouched base.
    """

    base: BaseModel
    tuned: Tuned | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold all weights, where a fine-tune left the base none."""
        return self.tuned.files if self.tuned is not None else ()


class SharedUNet:
    """Holds one UNet and exchanges its weights: an adapter for another, or all of them.

    Whoever asked before must ask again: what he was given has other weights now.

    Args:
        device: where it is.
        mixed_precision: it runs under this autocast, as in training; its matrices are stored in that precision.
    """

    def __init__(self, device: torch.device, mixed_precision: str) -> None:
        self.device = device
        self.mixed_precision = mixed_precision
        self._held: UNetWeights | None = None
        self._unet: Any = None

    def hold(self, wanted: UNetWeights) -> Any:
        """The UNet with these weights, under autocast, nothing trainable.

        Raises:
            UserError: for files that are missing or hold another model's weights.
        """
        if self._held != wanted:
            self._exchange(wanted)
        return self._unet

    def release(self) -> None:
        """Give its memory back; it is loaded anew when asked for."""
        self._held = self._unet = None
        release_memory()

    def _exchange(self, wanted: UNetWeights) -> None:
        held, self._held = self._held, None  # where what follows fails, nothing is held that is known
        dtype = self._matrices(wanted)
        if self._unet is not None and held is not None and self._keeps_base(held, wanted):
            if held.tuned is not None:
                held.tuned.detach(self._unet)
        else:
            self.release()
            self._unet = wanted.base.unet(dtype, self.device, wanted.files)
            use_precision(self._unet, self.device, self.mixed_precision)
        if wanted.tuned is not None and not wanted.files:
            wanted.tuned.attach(self._unet)
        self._held = wanted

    def _matrices(self, weights: UNetWeights) -> torch.dtype:
        """Precision of the matrices: the one that autocast rounds them to anyway."""
        read = weights.tuned is not None and weights.tuned.reads_matrices
        return torch.float32 if read else HALF.get(self.mixed_precision, torch.float32)

    def _keeps_base(self, held: UNetWeights, wanted: UNetWeights) -> bool:
        """Whether the base's weights that are held can stay."""
        if held.files or wanted.files or self._matrices(held) != self._matrices(wanted):
            return False
        return held.base.digest("unet") == wanted.base.digest("unet")
