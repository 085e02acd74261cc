"""A real, very small Stable Diffusion XL with random weights, and photographs to train it on."""

from __future__ import annotations

import gc
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from playwright.sync_api import Browser, sync_playwright
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dfu_mlflow.base.load import EMBEDDED
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import validate
from dfu_mlflow.data.phantom import write_phantom


def pytest_collection_finish() -> None:
    """Leave what the libraries made alone: a run gives back memory often, and each full search for cycles takes 0.6 s.

    (As entry points do after they have loaded them.)
    """
    gc.collect()
    gc.freeze()


def build_random_base(folder: Path) -> Path:
    """Real classes at tiny widths: 64 px images, 16 x 16 latents, about 0.2 M weights."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED["tiny_sdxl"] / "tokenizer")
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            scaling_factor=0.8,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text, projection_dim=24)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=(2, 4),
            cross_attention_dim=64,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            norm_num_groups=4,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="epsilon",
            timestep_spacing="trailing",
            clip_sample=False,
            set_alpha_to_one=False,
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the random base."""
    return build_random_base(tmp_path_factory.mktemp("random_base") / "base")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms of 12 patients in class folders, under names that say who is on them (P000 ...)."""
    folder = tmp_path_factory.mktemp("photographs")
    write_phantom(folder, patients=12, seed=3)
    return folder


@pytest.fixture(scope="session")
def small_config_at(random_base: Path, photographs: Path) -> Callable[[Path], RunConfig]:
    """Makes configurations of a run of a few steps on the random base, with everything it writes below a folder."""

    def at(folder: Path) -> RunConfig:
        tree = {
            "base_model": str(random_base),
            "output_dir": str(folder / "out"),
            "device": "cpu",
            "data": {"root": str(photographs), "group_by": r"^P(\d+)", "cache_dir": str(folder / "cache")},
            "train": {"epochs": 2, "steps_per_epoch": 3, "batch_size": 4, "learning_rate": 3e-4, "warmup_steps": 2},
            "sampling": {"num_inference_steps": 2},
            "evaluation": {
                "budget": None,
                "samples": 12,
                "grid_per_class": 2,
                "validation_images": 6,
                "validation_timesteps": 4,
            },
            "tracking": {"log_every_steps": 1, "system_metrics": False},
        }
        return validate(RunConfig, tree)

    return at


@pytest.fixture
def small_config(small_config_at: Callable[[Path], RunConfig], tmp_path: Path) -> RunConfig:
    """A run of a few steps on the random base."""
    return small_config_at(tmp_path)


@pytest.fixture(scope="module")  # while it is open, no other test of the process can run an event loop
def browser() -> Iterator[Browser]:
    """Headless Chromium; without one on this machine the test is skipped."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: install Debian's package `chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def wait_for() -> Callable[[str, subprocess.Popen[bytes]], None]:
    """Waits until a server that was started answers at an address."""

    def wait(url: str, server: subprocess.Popen[bytes]) -> None:
        deadline_s = time.monotonic() + 240
        while True:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline_s, "the server did not answer"
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return
            except OSError:
                time.sleep(0.5)

    return wait
