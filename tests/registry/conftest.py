"""A Stable Diffusion XL pipeline of real classes and 60,000 random weights, as a bundle; and an empty store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dfu_mlflow.bundle import BundleSource, write_bundle
from dfu_mlflow.bundle_format import Settings
from dfu_mlflow.config import RunConfig
from registry.package import RegisteredSampler, register_sampler
from tests.stores import new_store

PROMPTS = {"I": "inflamed", "P": "granulating", "R": "healed"}


def byte_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    symbols = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[], model_max_length=77)


def text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def random_pipeline() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config()),
        text_encoder_2=CLIPTextModelWithProjection(text_config()),
        tokenizer=byte_tokenizer(),
        tokenizer_2=byte_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        add_watermarker=False,
    )


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training leaves behind; guidance 2, three steps, 16 px."""
    folder = tmp_path_factory.mktemp("model")
    pipe = random_pipeline()
    pipe.save_pretrained(folder / "base")
    weights = {name: weight.detach() * 1.1 for name, weight in pipe.unet.named_parameters()}
    save_file(weights, folder / "weights.safetensors")
    config = RunConfig.model_validate({"base_model": str(folder / "base")})
    settings = Settings(guidance_scale=2.0, num_inference_steps=3, resolution_px=16, original_size_px=(16, 16))
    return write_bundle(
        folder / "bundle", config, BundleSource(folder / "weights.safetensors", PROMPTS, settings, "live")
    )


@pytest.fixture(scope="module")
def registry_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a fresh SQLite store that is this process's own while the module runs."""
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        store = new_store(folder)
        patch.setenv("MLFLOW_TRACKING_URI", store)
        for variable in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(variable, raising=False)
        mlflow.set_tracking_uri(store)
        yield folder
        mlflow.set_tracking_uri(None)  # the process's own choice ends; the variable is the patch's to put back


@pytest.fixture(scope="module")
def run_id(registry_store: Path) -> str:
    with mlflow.start_run() as run:
        pass
    return str(run.info.run_id)


@pytest.fixture(scope="module")
def registered(bundle: Path, run_id: str) -> RegisteredSampler:
    return register_sampler(
        bundle, RunConfig(), run_id, {"eval/kid": 0.25}, {"metric_identity": "efficientnet_lite0:abc"}
    )
