"""Load any Stable Diffusion XL base: the embedded one, a folder in diffusers layout, or a hub id."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import StableDiffusionXLPipeline
from torch import nn

from dfu_mlflow.errors import UserError
from dfu_mlflow.runtime import release_memory, state_digest
from dfu_mlflow.types import Pipeline

EMBEDDED = {"tiny_sdxl": Path(__file__).resolve().parent / "weights" / "tiny_sdxl"}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def resolve_base(base_model: str) -> str:
    """The folder of an embedded base; folders and hub ids as they are.

    Raises:
        UserError: for a folder that is not a Stable Diffusion XL pipeline.
    """
    folder = EMBEDDED.get(base_model, Path(base_model))
    if not folder.is_dir():
        if base_model.count("/") != 1 or base_model.startswith(("/", ".", "~")):
            raise UserError(
                f"--base_model {base_model}: no such folder; give {', '.join(EMBEDDED)}, a folder in diffusers layout "
                "(model_index.json, unet/, vae/, ...) or a hub id such as stabilityai/stable-diffusion-xl-base-1.0"
            )
        return base_model
    _check_layout(folder)
    return str(folder)


def load_base(base_model: str) -> Pipeline:
    """The whole pipeline in float32 on the CPU, nothing trainable.

    Raises:
        UserError: for a base that is missing, unreachable or not Stable Diffusion XL.
    """
    source = resolve_base(base_model)
    try:
        with _without_progress_bars():
            pipe = StableDiffusionXLPipeline.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, add_watermarker=False
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--base_model {base_model} cannot be loaded ({reason}); on a closed network give a folder in diffusers "
            "layout with safetensors weights"
        ) from None
    for part in PARTS:
        getattr(pipe, part).requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def give_up_text_encoders(pipe: Pipeline) -> None:
    """Free them, 3 GiB of SDXL: once its prompts are encoded nothing needs them."""
    pipe.register_modules(text_encoder=None, text_encoder_2=None)
    release_memory()


def part_digest(module: nn.Module) -> str:
    """SHA-256 over a module's weights: what caches and metric identities are keyed by."""
    return state_digest(dict(module.state_dict()))


def image_factor(pipe: Pipeline) -> int:
    """Pixels an edge of one latent cell: resolutions must be multiples of it times the UNet's own downscaling."""
    return int(pipe.vae_scale_factor)


def check_resolution(pipe: Pipeline, resolution_px: int) -> None:
    """Refuse a resolution that the autoencoder and the UNet cannot halve down evenly.

    Raises:
        UserError: naming the nearest resolutions that work.
    """
    step = image_factor(pipe) * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if resolution_px % step:
        low = resolution_px // step * step
        choices = f"{low} or {low + step}" if low else str(step)
        raise UserError(
            f"--data.resolution_px {resolution_px} is not divisible by {step} (autoencoder {image_factor(pipe)}x, UNet "
            f"{step // image_factor(pipe)}x): use {choices}"
        )


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Loading takes a second or reads a local disk: bars for it bury the messages that matter."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    shown = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, was_shown in zip(libraries, shown, strict=True):
            if was_shown:
                library.enable_progress_bar()


def _check_layout(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"--base_model {folder} is no diffusers pipeline: it has no model_index.json")
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--base_model {folder} cannot be read: {error}") from None
    missing = [part for part in PARTS if not parts.get(part, [None])[0]]
    if missing or unet.get("addition_embed_type") != "text_time":
        lack = f"it has no {', '.join(missing)}" if missing else "its UNet takes no text_time conditioning"
        raise UserError(f"--base_model {folder} is a {parts.get('_class_name')}, not Stable Diffusion XL: {lack}")
