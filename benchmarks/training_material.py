"""What the training benchmark works on: a pipeline folder and an image folder that both programs can read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dfu_mlflow.base.load import EMBEDDED
from dfu_mlflow.data.phantom import render

PROMPTS = {
    "I": "diabetic foot ulcer, inflammatory phase",
    "P": "diabetic foot ulcer, proliferative phase",
    "R": "diabetic foot ulcer, remodeling phase",
}
EMBEDDING_WIDTHS = (768, 1280)
"""Of Stable Diffusion XL's text encoders: 2,048 side by side, and 1,280 pooled."""


def write_base(folder: Path, case: str) -> Path:
    """The base to train: the embedded one, or random weights with real embedding widths and an 8x autoencoder."""
    if case == "tiny":
        return Path(shutil.copytree(EMBEDDED["tiny_sdxl"], folder))
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED["tiny_sdxl"] / "tokenizer")
    narrow, wide = (_text_config(tokenizer, width) for width in EMBEDDING_WIDTHS)
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            block_out_channels=(16, 16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=8,
            scaling_factor=0.13,
        ),
        text_encoder=CLIPTextModel(narrow),
        text_encoder_2=CLIPTextModelWithProjection(wide),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=(2, 4),
            cross_attention_dim=sum(EMBEDDING_WIDTHS),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=EMBEDDING_WIDTHS[1] + 6 * 256,
            norm_num_groups=8,
        ),
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def write_photographs(folder: Path, case: str, count: int) -> Path:
    """An imagefolder data set with captions that is at the same time one folder a class: 64 px, or 1 to 1.5 megapixel.

    The large ones are the phantom enlarged, with a camera's noise, so that a JPEG of them holds as much as a real one.
    """
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        patient, image = divmod(number, 6)
        phase = "IPR"[number % 3]
        pixels = render(patient, 0, image, phase)
        if case == "real_width":
            width, height = 1160 + 7 * (number % 40), 900 + 5 * (number % 30)
            large = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC), np.float32)
            pixels = (large + rng.normal(0, 4, large.shape).astype(np.float32)).clip(0, 255).astype(np.uint8)
        path = Path(phase) / f"P{patient:04d}N{image}.jpg"
        (folder / phase).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / path, quality=92)
        lines.append(json.dumps({"file_name": str(path), "text": PROMPTS[phase]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def _text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
