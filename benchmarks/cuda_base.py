"""Random bases for `benchmarks.cuda`: Stable Diffusion XL's real architecture or a small one, made on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dfu_mlflow.base.load import EMBEDDED
from dfu_mlflow.base.published import SDXL_TEXT, SDXL_TEXT_2, SDXL_UNET, SDXL_VAE


@dataclass(frozen=True)
class Architecture:
    """Configurations of the four networks, and the two sizes of pictures they are measured at [px]."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    text_2: dict[str, Any]
    sizes_px: tuple[int, int]


REAL = Architecture(
    SDXL_UNET, SDXL_VAE, {**SDXL_TEXT, "hidden_act": "quick_gelu"}, {**SDXL_TEXT_2, "hidden_act": "gelu"}, (512, 1024)
)
_SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
SMALL = Architecture(
    unet={
        **SDXL_UNET,
        "sample_size": 16,
        "block_out_channels": (32, 32, 64),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 1, 2),
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
    vae={**SDXL_VAE, "sample_size": 128, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    text=_SMALL_TEXT,
    text_2={**_SMALL_TEXT, "projection_dim": 32},
    sizes_px=(64, 128),
)
"""The same layout of blocks, with about a half million weights: every line runs on a CPU too."""


def write_random_base(folder: Path, architecture: Architecture, device: torch.device) -> Path:
    """Write a pipeline with random weights as fp16 safetensors in diffusers' layout.

    The vocabulary is the embedded base's, so that nothing is downloaded; text encoders get its length. All four
    networks are on the device together, in fp16: 7 GB at the real size.

    Args:
        folder: made when missing.
    """
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED["tiny_sdxl"] / "tokenizer")
    text, text_2 = (_text_config(tokenizer, given) for given in (architecture.text, architecture.text_2))
    with _half_by_default(), torch.device(device):
        parts = {
            "vae": AutoencoderKL.from_config(architecture.vae),
            "unet": UNet2DConditionModel.from_config(architecture.unet),
            "text_encoder": CLIPTextModel(text),
            "text_encoder_2": CLIPTextModelWithProjection(text_2),
        }
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    pipe = StableDiffusionXLPipeline(
        **parts,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def _text_config(tokenizer: CLIPTokenizer, given: dict[str, Any]) -> CLIPTextConfig:
    return CLIPTextConfig(
        **given,
        vocab_size=len(tokenizer),
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@contextmanager
def _half_by_default() -> Iterator[None]:
    """New weights are fp16: float32 ones would take 10 GB for the UNet before they are rounded."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(kept)
