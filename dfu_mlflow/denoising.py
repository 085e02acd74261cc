"""Noise -> latents -> pixels: what `StableDiffusionXLPipeline` computes, without what it computes again at every step.

A prompt does not change from step to step, so keys and values of cross-attention are computed at the first one. Where
the unconditional is zeros (`force_zeros_for_empty_prompt`) its values are zeros too, whatever the queries: these rows
get the output layer's answer to zeros, and half of the cross-attention is not computed at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

from dfu_mlflow.types import Conditioning

DECODED_PX = 2**20
"""Pixels that an accelerator decodes at a time: one picture of 1,024 px."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of a batch.

    Attributes:
        unconditional: what is pushed away from, one row a picture.
        scale: float32 [B], all above 1: below, the prompt alone is enough.
        rescale: share of the contrast restored (Lin et al. 2024, section 3.4).
    """

    unconditional: Conditioning
    scale: torch.Tensor
    rescale: float

    def __call__(self, predicted: torch.Tensor) -> torch.Tensor:
        """Predictions [2B, C, h, w], unconditional rows first -> [B, C, h, w]."""
        base, prompted = predicted.chunk(2)
        guided: torch.Tensor = base + self.scale[:, None, None, None].to(base.dtype) * (prompted - base)
        if self.rescale > 0:
            guided = rescale_noise_cfg(guided, prompted, guidance_rescale=self.rescale)
        return guided


@dataclass(frozen=True)
class Solver:
    """A diffusers scheduler, made for one batch.

    Attributes:
        scheduler: fresh: it carries state from step to step.
        told: keywords of its `step`.
        after_step: called after each step; raises to stop.
    """

    scheduler: Any
    told: Mapping[str, Any]
    after_step: Callable[[], None] | None = None


def denoise(
    unet: Any,
    solver: Solver,
    steps: int,
    noise: torch.Tensor,
    prompts: Conditioning,
    guidance: Guidance | None,
    keep_prompts: bool = True,
) -> torch.Tensor:
    """Solve from standard normal noise to latents.

    Args:
        noise: [B, C, h, w].
        guidance: None takes the prompts alone.
        keep_prompts: let cross-attention keep its keys and values from step to step; a compiled UNet, in which this
            state would have to be compiled anew, goes without.

    Returns:
        Latents of the noise's shape.
    """
    scheduler, dtype = solver.scheduler, noise.dtype
    scheduler.set_timesteps(steps)  # on the host: what a solver reads of them at each step is no synchronisation
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    told = prompts if guidance is None else _stack(guidance.unconditional, prompts)
    embeddings = told.embeddings.to(dtype)
    added = {"text_embeds": told.pooled.to(dtype), "time_ids": told.time_ids.to(dtype)}
    latents: torch.Tensor = noise * scheduler.init_noise_sigma
    with _fixed_prompts(unet) if keep_prompts else nullcontext():
        for timestep in scheduler.timesteps:
            rows = latents if guidance is None else torch.cat([latents] * 2)
            rows = scheduler.scale_model_input(rows, timestep)
            predicted = unet(rows, timestep, embeddings, added_cond_kwargs=added, return_dict=False)[0]
            if guidance is not None:
                predicted = guidance(predicted)
            latents = scheduler.step(predicted, timestep, latents, **solver.told, return_dict=False)[0].to(dtype)
            if solver.after_step is not None:
                solver.after_step()
    return latents


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, h, w] -> uint8 [B, H, W, 3] on the host.

    A few pictures at a time: one on a CPU, where more do not stay in its caches (64 px: 14-16 ms a picture alone, 18-20
    in batches of 8 to 32) and channels last is a tenth faster, and on an accelerator as many as fit `DECODED_PX`.
    """
    edge = int(latents.shape[-1]) * 2 ** (len(vae.config.block_out_channels) - 1)
    count = 1 if latents.device.type == "cpu" else max(1, DECODED_PX // edge**2)
    mean, deviation = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    latents = latents.to(vae.dtype)
    if mean and deviation:
        latents = latents * latents.new_tensor(deviation)[:, None, None]
    latents = latents / vae.config.scaling_factor
    if mean and deviation:
        latents = latents + latents.new_tensor(mean)[:, None, None]
    if latents.device.type == "cpu":
        latents = latents.contiguous(memory_format=torch.channels_last)
    pictures = [_pixels(vae.decode(part, return_dict=False)[0]) for part in latents.split(count)]
    return torch.cat(pictures).permute(0, 2, 3, 1).cpu()


def _pixels(decoded: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> 0 ... 255, rounded as the pipeline's own image processor does."""
    return ((decoded.float() * 0.5 + 0.5).clamp(0, 1) * 255).round().byte()


def _stack(first: Conditioning, second: Conditioning) -> Conditioning:
    return Conditioning(
        torch.cat([first.embeddings, second.embeddings]),
        torch.cat([first.pooled, second.pooled]),
        torch.cat([first.time_ids, second.time_ids]),
    )


@contextmanager
def _fixed_prompts(unet: Any) -> Iterator[None]:
    """Within it every cross-attention expects the same prompts at each call."""
    kept = unet.attn_processors
    unet.set_attn_processor(
        {
            name: _PromptAttention() if ".attn2." in name and type(processor) is AttnProcessor2_0 else processor
            for name, processor in kept.items()
        }
    )
    try:
        yield
    finally:
        unet.set_attn_processor(dict(kept))


class _PromptAttention:
    """Cross-attention of one layer to prompts that stay the same from the first call on."""

    def __init__(self) -> None:
        self.silent = 0
        self.keys_values: tuple[torch.Tensor, torch.Tensor] | None = None
        self.answer_to_zeros: torch.Tensor | None = None

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """[B, N, C] attends to [B, L, D]: [B, N, C]."""
        if self.keys_values is None:
            self._look_at(attn, hidden_states, encoder_hidden_states)
        assert self.keys_values is not None
        query = _heads(attn.to_q(hidden_states[self.silent :]), attn.heads)
        attended = F.scaled_dot_product_attention(query, *self.keys_values)
        answer: torch.Tensor = attn.to_out[0](attended.transpose(1, 2).flatten(2).to(query.dtype))
        if self.answer_to_zeros is not None:
            answer = torch.cat([self.answer_to_zeros.expand(self.silent, answer.shape[1], -1), answer])
        return answer

    def _look_at(self, attn: Any, hidden_states: torch.Tensor, prompts: torch.Tensor) -> None:
        values = attn.to_v(prompts)
        half = len(values) // 2
        if half and not values[:half].any() and values[half:].any():
            self.silent = half
            self.answer_to_zeros = attn.to_out[0](torch.zeros_like(hidden_states[:1, :1]))
        keys = attn.to_k(prompts[self.silent :])
        self.keys_values = _heads(keys, attn.heads), _heads(values[self.silent :], attn.heads)


def _heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]."""
    divided: torch.Tensor = rows.unflatten(-1, (heads, -1))
    return divided.transpose(1, 2)
