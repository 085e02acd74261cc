"""A drawn picture as a PNG that says what it is: one writer, so that `sample` and the servers give equal files."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dfu_mlflow.bundle_format import Settings

SYNTHETIC = "synthetic picture of a generative model, no photograph; not for diagnosis"


def png(image: np.ndarray, facts: Mapping[str, object]) -> bytes:
    """PNG of an image uint8 [H, W, 3] with text chunks for what it is and for each of its `picture_facts`."""
    chunks = PngInfo()
    chunks.add_text("Comment", SYNTHETIC)
    for name, value in facts.items():
        chunks.add_text(f"dfu:{name}", str(value))
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", pnginfo=chunks)
    return file.getvalue()


def picture_facts(label: str, seed: int, settings: Settings, model: str) -> dict[str, object]:
    """What decided a picture's pixels, under the names of the manifest; `model` is NAME/VERSION."""
    return {
        "class": label,
        "seed": seed,
        "guidance_scale": float(settings.guidance_scale),
        "num_inference_steps": settings.num_inference_steps,
        "scheduler": settings.scheduler,
        "model": model,
    }
