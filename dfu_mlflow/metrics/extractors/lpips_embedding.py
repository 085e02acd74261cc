"""LPIPS (Zhang et al. 2018, equation 1) as features: its distance is the squared Euclidean distance between them.

    LPIPS(x, y) = sum_l mean_hw sum_c w_lc (f_lhwc(x) - f_lhwc(y))²,   f of unit length over the channels

so every picture is embedded once as sqrt(w_lc / (H_l W_l)) f_lhwc, and all pairs come from inner products. The package
carries the weights w; the backbone's are torchvision's, from a configured file, torch's hub cache or a download.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import lpips
import torch
from torchvision.models import AlexNet_Weights, VGG16_Weights

from dfu_mlflow import runtime
from dfu_mlflow.metrics.extractors.base import NetworkExtractor
from dfu_mlflow.metrics.extractors.files import Unavailable, Weights, WeightsFile, obtain, read_state, wrong_file

CENTRE, SCALE = 127.5, 127.5
"""The package takes -1 to 1."""
Backbone = Literal["alex", "vgg"]


def lpips_weights(path: Path | None, backbone: Backbone) -> Weights:
    """Where the backbone's weights may lie and where torchvision publishes them."""
    published = {"alex": AlexNet_Weights.IMAGENET1K_V1, "vgg": VGG16_Weights.IMAGENET1K_V1}[backbone]
    name = published.url.rsplit("/", 1)[-1]
    file = WeightsFile((published.url,), name.rsplit("-", 1)[-1].removesuffix(".pth"))
    return Weights(
        f"lpips_{backbone}", "lpips", "--metrics.lpips_weights", (file,), round(published.meta["_file_size"]), path
    )


def lpips_embedding(
    path: Path | None, backbone: Backbone, size_px: int, allow_download: bool, device: torch.device | None = None
) -> NetworkExtractor | Unavailable:
    """LPIPS as features at size_px x size_px: 31,872 wide for AlexNet at 64 px, 499,712 for VGG16.

    64 px is the size of the patches that LPIPS was calibrated on. Features take 0.25 MB a picture for AlexNet and 4 MB
    for VGG16, growing with the square of the size.

    Raises:
        UserError: when `path` is given and holds another network.
    """
    weights = lpips_weights(path, backbone)
    found = obtain(weights, allow_download)
    if isinstance(found, Unavailable):
        return found
    network = lpips_network(backbone)
    try:
        _load_backbone(network, read_state(found, weights))
    except (KeyError, RuntimeError) as error:
        raise wrong_file(found, weights, " ".join(str(error).split())[:120]) from None
    embedding = _Embedding(network).eval()
    with torch.inference_mode():
        dimension = embedding(torch.zeros(1, 3, size_px, size_px)).shape[1]
    extractor = NetworkExtractor(f"lpips_{backbone}", runtime.file_digest(found), size_px, dimension)
    return extractor.attach(embedding, device or torch.device("cpu"), CENTRE, SCALE)


def lpips_network(backbone: Backbone) -> lpips.LPIPS:
    """The package's network with its own linear heads and a random backbone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package calls torchvision by an older name of its parameter
        return lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False)


def _load_backbone(network: lpips.LPIPS, state: dict[str, torch.Tensor]) -> None:
    """The package cuts torchvision's `features` into slices that keep the layers' numbers."""
    own = network.net.state_dict()
    network.net.load_state_dict({name: state[f"features.{name.partition('.')[2]}"] for name in own})


class _Embedding(torch.nn.Module):
    def __init__(self, network: lpips.LPIPS) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        maps = self.network.net(self.network.scaling_layer(pixels))
        parts = []
        for layer, head in zip(maps, self.network.lins, strict=True):
            weight = head.model[-1].weight.clamp(min=0).sqrt()  # the authors keep them from falling below zero
            scaled = lpips.normalize_tensor(layer) * weight.view(1, -1, 1, 1) / (layer.shape[2] * layer.shape[3]) ** 0.5
            parts.append(scaled.flatten(1))
        return torch.cat(parts, 1)
