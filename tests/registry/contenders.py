"""Real versions of known merit: the embedded base's UNet damaged more or less, or overfitted to a few pictures."""

from __future__ import annotations

from pathlib import Path

import mlflow
import torch
from safetensors.torch import save_file

from dfu_mlflow.base.load import load_base
from dfu_mlflow.bundle import BundleSource, write_bundle
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import dump_yaml, validate
from dfu_mlflow.preparation import Material, prepare, read_source, sampling_settings
from registry.package import RegisteredSampler, register_sampler

Weights = dict[str, torch.Tensor]


def contest_config(folder: Path, photographs: Path, base: str) -> RunConfig:
    tree = {
        "base_model": base,
        "output_dir": str(folder / "out"),
        "device": "cpu",
        "data": {
            "root": str(photographs),
            "group_by": r"^P(\d+)",
            "cache_dir": str(folder / "cache"),
            "validation_fraction": 0.4,
        },
        "sampling": {"num_inference_steps": 4},
        "evaluation": {"samples": 60, "grid_per_class": 2, "validation_images": 6, "validation_timesteps": 4},
        "memorisation": {"neighbours": 20, "membership_images": 10},
        "tracking": {"system_metrics": False},
        "gates": {"classes": {"enabled": False}},  # 13 photographs of each are held out: no class has a verdict
    }
    return validate(RunConfig, tree)


def undamaged() -> Weights:
    return {name: weight.detach().clone() for name, weight in load_base("tiny_sdxl").unet.named_parameters()}


def damaged(weights: Weights, share: float) -> Weights:
    """Noise of `share` of each matrix's own deviation on top: the larger, the worse the pictures."""
    source = torch.Generator().manual_seed(0)
    return {
        name: weight + share * weight.std() * torch.randn(weight.shape, generator=source) if weight.ndim > 1 else weight
        for name, weight in weights.items()
    }


def damaged_base(folder: Path, share: float) -> str:
    pipe = load_base("tiny_sdxl")
    pipe.unet.load_state_dict(damaged(undamaged(), share))
    pipe.save_pretrained(folder)
    return str(folder)


def overfitted(material: Material, steps: int) -> Weights:
    """The UNet after `steps` updates on one training photograph of each class: it gives them back."""
    pipe = load_base("tiny_sdxl")
    unet, latents = pipe.unet.requires_grad_(True).train(), material.train
    rows = torch.tensor([int((latents.class_ids == class_id).nonzero()[0]) for class_id in range(3)])
    means = latents.moments[rows].chunk(2, dim=1)[0] * pipe.vae.config.scaling_factor
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3)
    source, ids = torch.Generator().manual_seed(0), torch.arange(12) % 3
    told = material.conditioner.sampling(ids)
    for _ in range(steps):
        times = torch.randint(0, 1000, (12,), generator=source)
        noise = torch.randn((12, *means.shape[1:]), generator=source)
        noised = pipe.scheduler.add_noise(means[ids], noise, times)
        conditions = {"text_embeds": told["pooled_prompt_embeds"], "time_ids": latents.time_ids[rows][ids]}
        out = unet(noised, times, encoder_hidden_states=told["prompt_embeds"], added_cond_kwargs=conditions).sample
        alphas = pipe.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
        velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * means[ids]
        (out - velocity).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach().clone() for name, weight in unet.named_parameters()}


def register(
    folder: Path, config: RunConfig, weights: Weights, material: Material, guidance_scale: float = 3.0
) -> RegisteredSampler:
    """Bundle these weights as a full fine-tune, with a run that holds the configuration, as training leaves it."""
    folder.mkdir(parents=True)
    save_file(weights, folder / "weights.safetensors")
    own = config.model_copy(update={"sampling": config.sampling.model_copy(update={"guidance_scale": guidance_scale})})
    settings = sampling_settings(own, material.train)
    source = BundleSource(folder / "weights.safetensors", material.source.prompts, settings, "live")
    bundle = write_bundle(folder / "bundle", config, source)
    with mlflow.start_run() as run:
        mlflow.log_text(dump_yaml(config), "config.yaml")
    return register_sampler(bundle, config, run.info.run_id, {}, {})


def material_of(config: RunConfig) -> Material:
    return prepare(config, read_source(config))
