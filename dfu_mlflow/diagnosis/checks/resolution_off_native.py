"""Trained and sampled far from the resolution that the base knows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dfu_mlflow.base.load import resolve_base
from dfu_mlflow.diagnosis.bench import Bench
from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.metrics.kernel import kernel_distance

SDXL_PX = 1024
"""Of every published Stable Diffusion XL that is named by a hub id."""
GARBAGE, WORSE = 0.3, 0.45
"""Share of the native resolution below which the base draws patterns (128 of 1,024 px), and below which it repeats and
crops things; at a half it still draws."""
LARGE = 1.6
"""Above this many times the native resolution it repeats the subject."""
PICTURES = 24
NATIVE_LIMIT_PX = 512
"""Larger natives are not drawn on a CPU: the ratio alone decides."""


class ResolutionOffNative(Check):
    """Set resolution over native; the base drawn at both, downscaled alike."""

    id = "resolution_off_native"
    needs = ("base_model", "data.resolution_px", "the base, to draw at both")
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """The ratio decides, what the base draws is shown beside it."""
        resolution = int(case.setting("data.resolution_px"))
        native = native_px(str(case.setting("base_model")))
        ratio = resolution / native
        evidence = {
            "resolution_px": Figure(float(resolution), str(native)),
            "share_of_native": Figure(ratio, f"{WORSE} to {LARGE}"),
        }
        if WORSE <= ratio <= LARGE:
            return Healthy(evidence)
        if case.bench is not None and case.bench.has_base:
            try:
                self._draw(case.bench, native, evidence)
            except Lacking as reason:
                evidence["base_kid"] = Figure(f"not drawn: {reason}"[:200])
        return self.found(
            "blocker" if ratio < GARBAGE else "warning",
            0.9 if ratio < GARBAGE else 0.7,
            evidence,
            f"The base knows pictures of {native} px; at {resolution} px it draws patterns, and fine-tuning starts "
            "from "
            "those. Work at the native resolution, or at half of it at least.",
            {"data.resolution_px": native},
        )

    def _draw(self, bench: Bench, native: int, evidence: dict[str, Figure]) -> None:
        if native > NATIVE_LIMIT_PX and bench.material.device.type == "cpu":
            return
        edge = bench.config.data.resolution_px
        told = (native, native)
        _, small = bench.draw(bench.base_sampler(bench.settings()), PICTURES)
        _, whole = bench.draw(bench.base_sampler(bench.settings(resolution_px=native, original_size_px=told)), PICTURES)
        resized = torch.from_numpy(np.stack([_resized(picture, edge) for picture in whole]))
        real = bench.photograph_features
        evidence["base_kid_here"] = Figure(kernel_distance(real, bench.extractor(torch.from_numpy(small))))
        evidence["base_kid_native"] = Figure(kernel_distance(real, bench.extractor(resized)))


def native_px(base_model: str) -> int:
    """Edge of the pictures that a base was made for.

    Raises:
        Lacking: for a folder whose configuration does not tell.
    """
    folder = Path(resolve_base(base_model))
    if not folder.is_dir():
        return SDXL_PX
    try:
        unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        return int(unet["sample_size"]) * int(2 ** (len(vae["block_out_channels"]) - 1))
    except (OSError, ValueError, KeyError, TypeError):
        raise Lacking(f"the base in {folder} does not tell its native resolution (unet sample_size)") from None


def _resized(picture: np.ndarray, edge: int) -> np.ndarray:
    return np.array(Image.fromarray(picture).resize((edge, edge), Image.Resampling.LANCZOS))
