"""InceptionV3 as ported for FID, where its weights are at hand: a configured file, a cache, or an allowed download.

The network is torch-fidelity's, the resizing clean-fid's, the weights those of pytorch-fid and torch-fidelity alike
(SHA-256 6726825d…). Nothing stands in for it: without weights there is no `fid`.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from cleanfid.inception_torchscript import InceptionV3W
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from dfu_mlflow import runtime
from dfu_mlflow.metrics.extractors.base import NetworkExtractor
from dfu_mlflow.metrics.extractors.files import (
    Unavailable,
    Weights,
    WeightsFile,
    is_own,
    obtain,
    read_state,
    wrong_file,
)

HASH_PREFIX = "6726825d"
CLEANFID_FOLDER = Path("/tmp")
SIZE_PX, CENTRE, SCALE = 299, 128.0, 128.0


def inception_weights(path: Path | None) -> Weights:
    """Where the weights may lie and where they are published."""
    published = WeightsFile((URL_INCEPTION_V3,), HASH_PREFIX, ("pt_inception-2015-12-05-6726825d.pth",))
    return Weights("inception", "fid", "--metrics.inception_weights", (published,), 91, path)


def inception(
    path: Path | None, allow_download: bool, device: torch.device | None = None
) -> NetworkExtractor | Unavailable:
    """2,048 pooled features of FID's InceptionV3.

    Looked for in this order: `path` (state dict as .pth or safetensors), torch's hub cache, the TorchScript file that
    clean-fid leaves in /tmp, a download into the hub cache. The identity calls weights that are not the published file
    `inception_unpublished`.

    Raises:
        UserError: when `path` is given and is not such a file.
    """
    device = device or torch.device("cpu")
    weights = inception_weights(path)
    if weights.find() is None and is_own(CLEANFID_FOLDER / "inception-2015-12-05.pt"):
        return _from_cleanfid(CLEANFID_FOLDER, device)
    found = obtain(weights, allow_download)
    if isinstance(found, Unavailable):
        return found
    return _from_state(read_state(found, weights), found, weights, device)


def _from_state(state: dict[str, torch.Tensor], path: Path, weights: Weights, device: torch.device) -> NetworkExtractor:
    # torch-fidelity unpickles what it is given: it gets these tensors, already read safely, from memory instead.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=buffer)
    except RuntimeError as error:
        raise wrong_file(path, weights, " ".join(str(error).split())[:120]) from None
    # Its children stand in the order of its forward pass, which itself takes whole numbers and resizes otherwise.
    layers = [layer for name, layer in network.named_children() if name != "fc"]
    digest = runtime.file_digest(path)
    name = "inception" if digest.startswith(HASH_PREFIX) else "inception_unpublished"
    extractor = NetworkExtractor(name, digest, SIZE_PX, 2048)
    return extractor.attach(torch.nn.Sequential(*layers, torch.nn.Flatten()), device, CENTRE, SCALE)


def _from_cleanfid(folder: Path, device: torch.device) -> NetworkExtractor:
    digest = runtime.file_digest(folder / "inception-2015-12-05.pt")
    network = InceptionV3W(str(folder), download=False)
    extractor = NetworkExtractor("inception_torchscript", digest, SIZE_PX, 2048)
    return extractor.attach(network, device, 0.0, 1.0)
