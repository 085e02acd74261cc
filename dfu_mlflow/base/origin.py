"""Where fine-tuning starts from, to measure how far it has gone."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn

from dfu_mlflow.base.adapters import ADAPTER
from dfu_mlflow.base.weight_files import read_tensors_in_turn, tensor_names, weight_files
from dfu_mlflow.config.schema import AdapterConfig

logger = logging.getLogger(__name__)


class Origin:
    """The base's UNet, to measure displacement from; made before the first step.

    LoRA needs the norm of its weights alone. Full fine-tuning needs the weights, of which a copy takes 10 GiB for
    SDXL: they are read from the base's files again, tensor by tensor, and copied where the UNet came from no files.

    Args:
        unet: made trainable by `attach`, its weights still the base's.
        config: says by which method.
    """

    def __init__(self, unet: nn.Module, config: AdapterConfig) -> None:
        base = {name: weight for name, weight in unet.named_parameters() if "lora_" not in name}
        self._norm = math.sqrt(sum(_squares(weight) for weight in base.values()))
        self._full = config.method == "full"
        self._files: Mapping[str, Path] = {}
        self._copies: Mapping[str, torch.Tensor] = {}
        if self._full:
            files = _files(unet)  # they may hold more than the network took
            if files.keys() >= base.keys():
                self._files = {name: files[name] for name in base}
            else:
                self._copies = {name: weight.detach().cpu().clone() for name, weight in base.items()}

    @torch.no_grad()
    def displacement(self, unet: nn.Module) -> float:
        """How far the effective weights have moved: ||W - W0|| / ||W0|| over the whole UNet.

        For LoRA the difference is each adapter's own scale * B A; a DoRA magnitude is not counted. NaN where the
        base's files are gone meanwhile.
        """
        try:
            squares = self._squares_of_changes(unet) if self._full else self._squares_of_adapters(unet)
            return math.sqrt(sum(squares)) / self._norm
        except (OSError, SafetensorError) as error:
            logger.warning("how far the weights moved is not measured: the base's files cannot be read: %s", error)
            return math.nan

    def _squares_of_changes(self, unet: nn.Module) -> Iterator[float]:
        """Of what was added to each weight."""
        weights = dict(unet.named_parameters())
        for name, start in self._starts():
            yield _squares(weights[name].float() - start.to(weights[name]).float())

    def _squares_of_adapters(self, unet: nn.Module) -> Iterator[float]:
        """The same of each LoRA, without making the matrix that it adds: ||s B A||^2 = s^2 tr(B'B AA')."""
        layers: list[Any] = [layer for layer in unet.modules() if isinstance(layer, LoraLayer)]
        for layer in layers:
            factors = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
            down, up = (weight.detach().double().flatten(1) for weight in factors)
            inner = (up.T @ up) * (down @ down.T)
            yield float(layer.scaling[ADAPTER]) ** 2 * max(0.0, float(inner.sum()))

    def _starts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The base's weights by name, one at a time."""
        yield from self._copies.items()
        for file in sorted(set(self._files.values())):
            own = [name for name, place in self._files.items() if place == file]
            yield from read_tensors_in_turn(file, own)


def _files(unet: nn.Module) -> dict[str, Path]:
    """Tensor's name -> the file in diffusers layout that it was loaded from; empty without one."""
    name = unet.config.get("_name_or_path")  # type: ignore[union-attr, operator]
    if not name:
        return {}
    try:
        return {name: file for file in weight_files(Path(name)) for name in tensor_names(file)}
    except (OSError, SafetensorError):
        return {}


def _squares(values: torch.Tensor) -> float:
    """Sum of squares, added up in double precision."""
    return float(torch.linalg.vector_norm(values.detach(), dtype=torch.float64)) ** 2
