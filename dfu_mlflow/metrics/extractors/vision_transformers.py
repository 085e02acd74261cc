"""DINOv2 and CLIP's image tower, from a folder in the hub's layout: configured, cached, or an allowed download."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, CLIPVisionModelWithProjection, Dinov2Model
from transformers.utils import logging as hub_logging

from dfu_mlflow import runtime
from dfu_mlflow.metrics.extractors.base import IMAGENET, Level, NetworkExtractor
from dfu_mlflow.metrics.extractors.files import Unavailable, Weights, WeightsFile, obtain, wrong_file

DINO_SIZE_PX = 224
"""What Stein et al. 2023 (dgm-eval) use; 16 x 16 patches."""
DINO_MODELS = {"dinov2-small": 88, "dinov2-base": 346, "dinov2-large": 1217}
"""Hub name (of facebook/) -> size in MB. Stein et al. use the large one; the small one is 12 times as fast."""
CLIP_REPOSITORY = "openai/clip-vit-large-patch14-336"
"""CMMD's network (Jayasumana et al. 2024, section 4)."""
CLIP_INPUT: tuple[Level, Level] = (
    (0.48145466 * 255, 0.4578275 * 255, 0.40821073 * 255),
    (0.26862954 * 255, 0.26130258 * 255, 0.27577711 * 255),
)


def dino_weights(path: Path | None, model: str) -> Weights:
    """Where DINOv2's weights may lie and where they are published."""
    return _repository("dinov2", "fd_dinov2 and its kin", "--metrics.dino_weights", f"facebook/{model}", path)


def clip_weights(path: Path | None) -> Weights:
    """Where CLIP's weights may lie and where they are published."""
    return _repository("clip", "cmmd", "--metrics.clip_weights", CLIP_REPOSITORY, path)


def dinov2(
    path: Path | None, model: str, allow_download: bool, device: torch.device | None = None
) -> NetworkExtractor | Unavailable:
    """Class-token features of DINOv2 (Oquab et al. 2023) at 224 px: 384 wide for `dinov2-small`, 1,024 for the large.

    Raises:
        UserError: when the folder holds another model or incomplete weights.
    """
    weights = dino_weights(path, model)
    folder = obtain(weights, allow_download)
    if isinstance(folder, Unavailable):
        return folder
    network = _load(Dinov2Model, folder, ("dinov2",), weights)
    side = network.config.patch_size * (DINO_SIZE_PX // network.config.patch_size)
    extractor = _extractor("dinov2", network, side, network.config.hidden_size)
    return extractor.attach(_Output(network, "pooler_output"), device or torch.device("cpu"), *IMAGENET)


def clip(path: Path | None, allow_download: bool, device: torch.device | None = None) -> NetworkExtractor | Unavailable:
    """Image embeddings of CLIP (Radford et al. 2021) at the tower's own size: 768 wide at 336 px for ViT-L/14-336.

    Raises:
        UserError: when the folder holds another model or incomplete weights.
    """
    weights = clip_weights(path)
    folder = obtain(weights, allow_download)
    if isinstance(folder, Unavailable):
        return folder
    network = _load(CLIPVisionModelWithProjection, folder, ("clip", "clip_vision_model"), weights)
    extractor = _extractor("clip", network, network.config.image_size, network.config.projection_dim)
    return extractor.attach(_Output(network, "image_embeds"), device or torch.device("cpu"), *CLIP_INPUT)


class _Output(torch.nn.Module):
    def __init__(self, network: Any, output: str) -> None:
        super().__init__()
        self.network, self.output = network, output

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.network(pixel_values=pixels)[self.output]
        return features


def _repository(name: str, used_for: str, flag: str, repository: str, path: Path | None) -> Weights:
    """The hub's two formats of weights are alternatives; both are read as tensors only."""
    url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{repository}/resolve/main"
    files = (
        WeightsFile((f"{url}/config.json",)),
        WeightsFile((f"{url}/model.safetensors", f"{url}/pytorch_model.bin")),
    )
    size_mb = DINO_MODELS.get(repository.rsplit("/", 1)[-1], 1711)
    return Weights(name, used_for, flag, files, size_mb, path, repository)


def _extractor(name: str, network: Any, size_px: int, dimension: int) -> NetworkExtractor:
    """The hash is of the tensors, so that both formats of one model are one identity."""
    return NetworkExtractor(name, runtime.state_digest(network.state_dict()), size_px, dimension)


def _load(model: Any, folder: Path, kinds: tuple[str, ...], weights: Weights) -> Any:
    """Raises UserError unless every tensor of `model` comes from the folder: the library would fill gaps at random."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = config.model_type
        if kind not in kinds:
            raise wrong_file(folder, weights, f"a model of kind {kind}")
        if kind == "clip":
            config.vision_config.projection_dim = config.projection_dim
            config = config.vision_config
        with _quietly():
            network, info = model.from_pretrained(
                folder, config=config, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise wrong_file(folder, weights, " ".join(str(error).split())[:120]) from None
    except Exception as error:  # a broken safetensors file raises an error of its own
        if type(error).__module__.partition(".")[0] not in ("safetensors", "pickle", "_pickle"):
            raise
        raise wrong_file(folder, weights, type(error).__name__) from None
    if info["missing_keys"]:
        raise wrong_file(folder, weights, f"{len(info['missing_keys'])} tensors are missing")
    return network


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bar, and no table of the text tower's tensors, which are left out on purpose."""
    level, bar = hub_logging.get_verbosity(), hub_logging.is_progress_bar_enabled()
    hub_logging.set_verbosity(logging.CRITICAL)
    hub_logging.disable_progress_bar()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if bar:
            hub_logging.enable_progress_bar()
