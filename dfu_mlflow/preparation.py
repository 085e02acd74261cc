"""Everything a run needs before its first step: checked first, loaded after, cached where it is costly."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dfu_mlflow.base.autoencoder import VaeEncoder
from dfu_mlflow.base.load import PARTS, BaseModel, check_resolution, resolve_base
from dfu_mlflow.base.shared_unet import SharedUNet
from dfu_mlflow.base.weight_files import FileDigests
from dfu_mlflow.bundle_format import Settings
from dfu_mlflow.conditioning import Conditioner, EmbeddingCache, encode_prompts
from dfu_mlflow.config.prompts import resolve_prompts
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.data import Audit, RowCache, default_cache_dir, encode_evaluation_latents, encode_latents, load_split
from dfu_mlflow.runtime import pick_device
from dfu_mlflow.types import Latents, Pipeline, Split


@dataclass(frozen=True)
class Source:
    """The photographs and what they are called.

    Attributes:
        split: records by patient.
        audit: what was wrong with the files.
        prompts: class label -> prompt, in the order of the class ids.
    """

    split: Split
    audit: Audit
    prompts: dict[str, str]


@dataclass(frozen=True)
class Material:
    """What training and evaluation work on.

    Attributes:
        source: the photographs.
        base: where the networks come from, the UNet among them.
        pipe: the base with its autoencoder; it gets a UNet when one is to be trained.
        conditioner: encoded prompts.
        train, held_out: latents of the training views and of the held-out pictures' evaluation views.
        cache: where costly rows are kept.
        encoder: the autoencoder's identity and first half.
        digests: part of the base -> SHA-256 of its weights.
        device: where the networks are.
        shared_unet: the one UNet of an evaluation, see `SharedUNet`; training has its own.
    """

    source: Source
    base: BaseModel
    pipe: Pipeline
    conditioner: Conditioner
    train: Latents
    held_out: Latents
    cache: RowCache
    encoder: VaeEncoder
    digests: dict[str, str]
    device: torch.device
    shared_unet: SharedUNet


def read_source(config: RunConfig) -> Source:
    """Find, audit and split the photographs; every complaint comes before anything heavy is loaded.

    Raises:
        UserError: see `load_split`, `resolve_prompts` and `resolve_base`.
    """
    resolve_base(config.base_model)
    split, audit = load_split(config.data, config.seed)
    return Source(split, audit, resolve_prompts(config.prompts, split.classes))


def prepare(config: RunConfig, source: Source) -> Material:
    """Open the base; encode photographs and prompts, or find them in the cache.

    One network is in memory at a time: text encoders where the cache lacks a prompt, then the autoencoder, which stays.
    The UNet is not loaded.

    Raises:
        UserError: for a base that does not load or does not fit the resolution.
    """
    cache = RowCache(default_cache_dir(config.data))
    base = BaseModel(config.base_model, FileDigests(cache.folder))
    check_resolution(base, config.data.resolution_px)
    device = pick_device(config.device)
    digests = {part: base.digest(part) for part in PARTS}
    conditioner = encode_prompts(base, source.prompts, config.prompts.negative_prompt, embedding_cache(cache, base))
    vae = base.vae().to(device)
    pipe = base.pipeline()
    pipe.register_modules(vae=vae)
    encoder = VaeEncoder(vae, digests["vae"])
    train = encode_latents(source.split.train, config.data, config.seed, cache, encoder)
    held_out = encode_evaluation_latents(source.split.held_out, config.data, cache, encoder)
    shared_unet = SharedUNet(device, config.train.mixed_precision)
    conditioner = conditioner.to(device)
    return Material(source, base, pipe, conditioner, train, held_out, cache, encoder, digests, device, shared_unet)


def embedding_cache(cache: RowCache, base: BaseModel) -> EmbeddingCache:
    """Where embeddings by a base's text encoders are kept."""
    return EmbeddingCache(cache, (base.digest("text_encoder"), base.digest("text_encoder_2")))


def sampling_settings(config: RunConfig, train: Latents) -> Settings:
    """How this run draws pictures; the size told to the model is what it was told most in training."""
    told = config.sampling.original_size_px
    if told is None:
        height, width = train.time_ids[:, :2].median(dim=0).values.tolist()
        told = (int(height), int(width))
    return Settings(
        guidance_scale=config.sampling.guidance_scale,
        num_inference_steps=config.sampling.num_inference_steps,
        resolution_px=config.data.resolution_px,
        original_size_px=told,
        scheduler=config.sampling.scheduler,
        guidance_rescale=config.sampling.guidance_rescale,
        prediction_type=config.loss.prediction_type,
    )
