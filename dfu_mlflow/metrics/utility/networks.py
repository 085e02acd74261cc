"""The classifier of the utility figures: a small network of our own, or any timm model by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.utils.hub import cached_file

from dfu_mlflow.config.judgement import UtilityConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.extractors.base import resized
from dfu_mlflow.metrics.utility.small_cnn import SmallCnn

SMALL = "small_cnn"
HUB_FILE = "model.safetensors"


@dataclass(frozen=True)
class Classifier:
    """A network and how it wants its pictures.

    Attributes:
        network: float32 [B, 3, S, S] -> logits [B, classes].
        size_px: S; None takes pictures as large as they are.
        mean, deviation: [3], of pixels in 0..1.
    """

    network: nn.Module
    size_px: int | None
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def prepare(self, images: torch.Tensor, device: torch.device) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> the network's input on `device`."""
        size = self.size_px or images.shape[1]
        pixels = resized(images.to(device), size) / 255.0
        mean, deviation = (torch.tensor(part, device=device)[:, None, None] for part in (self.mean, self.deviation))
        return (pixels - mean) / deviation


def build_classifier(config: UtilityConfig, classes: int) -> Classifier:
    """A fresh classifier; its new weights come from torch's generator as it stands.

    Raises:
        UserError: for a name that timm does not know, or pretrained weights that are not there or do not fit.
    """
    if config.network == SMALL:
        return Classifier(SmallCnn(classes), config.size_px, (0.5,) * 3, (0.5,) * 3)
    import timm  # takes 4 s, and only who asks for one of its models needs it

    if not timm.is_model(config.network):
        close = ", ".join(timm.list_models(f"*{config.network.split('_')[0].split('.')[0]}*")[:5])
        raise UserError(
            f"--utility.network {config.network}: neither {SMALL} nor a model of timm {timm.__version__}"
            + (f"; it has {close} ..." if close else "")
        )
    network = timm.create_model(config.network, pretrained=False, num_classes=classes)
    known: dict[str, Any] = dict(cast(Any, network).pretrained_cfg)
    if config.pretrained:
        _load_pretrained(network, _weights_path(config, known), known)
    size = config.size_px or int(known["input_size"][-1])
    return Classifier(network, size, tuple(known["mean"]), tuple(known["std"]))


def _weights_path(config: UtilityConfig, known: Mapping[str, object]) -> Path:
    """The configured file, or what the hub's cache holds; nothing is downloaded."""
    if config.weights is not None:
        return config.weights
    repository = str(known.get("hf_hub_id") or "")
    found = None
    if repository:
        found = cached_file(
            repository,
            HUB_FILE,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if found is None:
        raise UserError(
            f"--utility.network {config.network}: no pretrained weights in the hub's cache"
            f"{f' ({repository})' if repository else ''}; give a file with --utility.weights, or train from random"
            " weights with --utility.pretrained false"
        )
    return Path(found)


def _load_pretrained(network: nn.Module, path: Path, known: Mapping[str, object]) -> None:
    """Everything but the last layer, which is this task's own."""
    state = _read(path)
    head = known.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((head,) if isinstance(head, str) else tuple(head)))  # type: ignore[arg-type]
    wanted = network.state_dict()
    kept = {name: value for name, value in state.items() if not name.startswith(heads)} if heads else state
    missing = [name for name in wanted if name not in kept and not (heads and name.startswith(heads))]
    strange = [name for name in kept if name not in wanted or kept[name].shape != wanted[name].shape]
    if missing or strange:
        raise UserError(
            f"--utility.weights {path} is of another network: {len(missing)} weights are missing"
            f" ({', '.join(missing[:2])}), {len(strange)} do not fit ({', '.join(strange[:2])})"
        )
    network.load_state_dict(kept, strict=False)


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file from outside may fail in the unpickler, the zip reader or safetensors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--utility.weights {path} cannot be read: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"--utility.weights {path} holds no plain state dict: save the network's state_dict() alone")
    return state
