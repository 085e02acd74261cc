"""A LoRA checkpoint in MLflow's own flavor: loaded without this project's code it is the same model."""

from __future__ import annotations

from pathlib import Path

import mlflow
import mlflow.diffusers
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from dfu_mlflow.base.adapters import attach
from dfu_mlflow.base.load import load_base
from dfu_mlflow.bundle import BundleSource, write_bundle
from dfu_mlflow.bundle_format import Settings
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import validate
from dfu_mlflow.sampling import Sampler
from registry.package import ADAPTER_TAG, RegisteredSampler, register_sampler

PROMPTS = {"I": "inflamed", "P": "granulating", "R": "healed"}


def lora_bundle(folder: Path, use_dora: bool) -> tuple[Path, RunConfig]:
    """The embedded base with a LoRA of random weights and a scale that is not 1."""
    adapter = {"method": "lora", "rank": 2, "alpha": 3.0, "use_dora": use_dora}
    config = validate(RunConfig, {"adapter": adapter, "registry": {"name": "lora"}})
    weights = attach(load_base(config.base_model).unet, config.adapter, seed=0)
    torch.manual_seed(1)
    moved = {name: weight.detach() + 0.2 * torch.randn_like(weight) for name, weight in weights.items()}
    save_file(moved, folder / "weights.safetensors")
    settings = Settings(guidance_scale=2.0, num_inference_steps=2, resolution_px=64, original_size_px=(64, 64))
    return write_bundle(
        folder / "bundle", config, BundleSource(folder / "weights.safetensors", PROMPTS, settings, "live")
    ), config


# MLflow 3.17.2 loads the base with an argument that diffusers 0.42 calls old.
@pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated:FutureWarning")
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_flavors_pipeline_is_the_samplers(use_dora: bool, run_id: str, tmp_path: Path) -> None:
    bundle, config = lora_bundle(tmp_path, use_dora)
    version = register_sampler(bundle, config, run_id, {}, {})
    tags = MlflowClient().get_model_version(version.name, str(version.version)).tags
    loaded = mlflow.diffusers.load_model(tags[ADAPTER_TAG])
    assert Path(loaded.base_model).is_absolute()
    pipe, own = loaded.load_pipeline(device="cpu"), Sampler.load(bundle, "cpu").pipe
    told = {"text_embeds": torch.randn(1, pipe.text_encoder_2.config.projection_dim), "time_ids": torch.ones(1, 6) * 64}
    given = torch.randn(1, 4, 16, 16), 500, torch.randn(1, 77, own.unet.config.cross_attention_dim)
    with torch.no_grad():
        base, found, expected = (
            each.unet(*given, added_cond_kwargs=told).sample for each in (load_base("tiny_sdxl"), pipe, own)
        )
    assert (base - expected).abs().max() > 0.01, "the adapter changes nothing: nothing is compared"
    torch.testing.assert_close(found, expected)


def test_a_fully_trained_model_has_none(registered: RegisteredSampler) -> None:
    assert ADAPTER_TAG not in MlflowClient().get_model_version(registered.name, str(registered.version)).tags
