"""Does a packaged sampler fit this machine? Asked before it is loaded, also beside another one that is served."""

from __future__ import annotations

from pathlib import Path

import torch

from dfu_mlflow.bundle_format import BUNDLE
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import validate
from dfu_mlflow.documents import read_document
from dfu_mlflow.memory_limits import require_memory
from dfu_mlflow.memory_phases import sampling_memory


def require_room(bundle: Path, device: torch.device) -> None:
    """Refuse a sampler that the system would kill.

    Raises:
        UserError: with what it would take; when the folder is no bundle.
    """
    facts = read_document(bundle / BUNDLE, "sampler")
    base, settings = facts["base"], facts["settings"]
    tree = {
        "base_model": str(bundle / "base") if base["bundled"] else base["source"],
        "device": str(device),
        "adapter": facts["adapter"],
        "train": {"mixed_precision": facts.get("mixed_precision", "no")},
        "data": {"resolution_px": settings["resolution_px"]},
        "sampling": {"batch_size": facts["batch_size"], "guidance_scale": settings["guidance_scale"]},
    }
    require_memory(validate(RunConfig, tree), device, sampling_memory)
