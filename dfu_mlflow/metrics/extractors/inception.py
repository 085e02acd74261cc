"""InceptionV3 as ported for FID, where its weights are at hand: a configured file, a cache, or an allowed download.

The network is torch-fidelity's, the resizing clean-fid's, the weights those of pytorch-fid and torch-fidelity alike
(SHA-256 6726825d…). Nothing stands in for it: without weights there is no `fid`.
"""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from cleanfid.inception_torchscript import InceptionV3W
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from dfu_mlflow import runtime
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.extractors.base import NetworkExtractor

FILE_NAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
HASH_PREFIX = "6726825d"
CLEANFID_FOLDER = Path("/tmp")
SIZE_PX, CENTRE, SCALE = 299, 128.0, 128.0


@dataclass(frozen=True)
class Unavailable:
    """Why there is no Inception, for a note."""

    reason: str


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
    if path is not None:
        return _from_state(_read_state(path), path, device)
    cached: Path | Unavailable | None = _cached()
    if cached is None and _is_own(CLEANFID_FOLDER / "inception-2015-12-05.pt"):
        return _from_cleanfid(CLEANFID_FOLDER, device)
    if cached is None and allow_download:
        cached = _download()
    if cached is None:
        return Unavailable("no Inception weights: set --metrics.inception_weights or --metrics.allow_download true")
    return cached if isinstance(cached, Unavailable) else _from_state(_read_state(cached), cached, device)


def _cached() -> Path | None:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    found = [folder / name for name in FILE_NAMES if (folder / name).is_file()]
    return next((file for file in found if runtime.file_digest(file).startswith(HASH_PREFIX)), None)


def _download() -> Path | Unavailable:
    target = Path(torch.hub.get_dir()) / "checkpoints" / FILE_NAMES[1]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(target), hash_prefix=HASH_PREFIX, progress=False)
    except (OSError, RuntimeError) as error:
        return Unavailable(f"Inception weights could not be downloaded: {' '.join(str(error).split())}")
    return target


def _is_own(path: Path) -> bool:
    """A plain file of this user's: anybody can leave one in a shared folder, and TorchScript is code."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"Inception weights {path} do not exist: mend --metrics.inception_weights") from None
    except Exception as error:  # a file from outside may fail in the unpickler, the zip reader or safetensors
        raise _wrong_file(path, type(error).__name__) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise _wrong_file(path, "not a table of tensors")
    return dict(state)


def _wrong_file(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} does not hold FID's InceptionV3 weights ({what}): --metrics.inception_weights takes {FILE_NAMES[0]},"
        " or its tensors as safetensors"
    )


def _from_state(state: dict[str, torch.Tensor], path: Path, device: torch.device) -> NetworkExtractor:
    # torch-fidelity unpickles what it is given: it gets these tensors, already read safely, from memory instead.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=buffer)
    except RuntimeError as error:
        raise _wrong_file(path, " ".join(str(error).split())[:120]) from None
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
