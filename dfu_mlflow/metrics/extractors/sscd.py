"""SSCD, the copy detector (Pizzi et al. 2022): published as TorchScript, which is code.

It is loaded only from a file of the user's own that `metrics.sscd_weights` names: no cache is searched, and a download
is not used before the user has named it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dfu_mlflow import runtime
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.extractors.base import IMAGENET, NetworkExtractor
from dfu_mlflow.metrics.extractors.files import Unavailable, Weights, WeightsFile, is_own, obtain, wrong_file

SIZE_PX = 320
"""The authors' square size for copy detection without keeping the aspect ratio."""
DIMENSION = 512
URL = "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt"


def sscd_weights(path: Path | None) -> Weights:
    """Where the weights are published; they are found only where `path` says."""
    return Weights("sscd", "copies", "--metrics.sscd_weights", (WeightsFile((URL,)),), 99, path, "", automatic=False)


def sscd(path: Path | None, device: torch.device | None = None) -> NetworkExtractor | Unavailable:
    """Copy-detection descriptors at 320 px, 512 wide, of unit length.

    Raises:
        UserError: when the file is missing, belongs to somebody else, is a link, or is another network.
    """
    weights, device = sscd_weights(path), device or torch.device("cpu")
    found = obtain(weights, allow_download=False)
    if isinstance(found, Unavailable):
        return found
    if not found.is_file():
        raise UserError(f"sscd weights {found} do not exist: mend {weights.flag}")
    if not is_own(found):
        raise UserError(
            f"{found} is TorchScript, which is code, and not a plain file of your own: copy it, {weights.flag}"
        )
    network = _load(found, weights, device)
    return NetworkExtractor("sscd", runtime.file_digest(found), SIZE_PX, DIMENSION).attach(network, device, *IMAGENET)


def _load(path: Path, weights: Weights, device: torch.device) -> torch.nn.Module:
    try:
        network: torch.nn.Module = torch.jit.load(str(path), map_location=device)
        with torch.inference_mode():
            shape = tuple(network(torch.zeros(1, 3, SIZE_PX, SIZE_PX, device=device)).shape)
    except Exception as error:  # TorchScript of another network may fail anywhere
        raise wrong_file(path, weights, " ".join(str(error).split())[:120]) from None
    if shape != (1, DIMENSION):
        raise wrong_file(path, weights, f"its output has shape {list(shape)}")
    return network
