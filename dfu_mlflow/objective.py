"""Noise, target and weighting: latents and conditioning -> a loss for each sample.

Symbols: z0 clean latents, zt noised latents, a_t = sqrt(alphas_cumprod[t]), s_t = sqrt(1 - alphas_cumprod[t]),
e noise, v = a_t e - s_t z0 (Salimans & Ho 2022), SNR(t) = a_t^2 / s_t^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import nn

from dfu_mlflow.config.schema import LossConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.perceptual import PerceptualTerm
from dfu_mlflow.runtime import generator
from dfu_mlflow.types import Conditioning, Draws

TIMESTEPS = 1000
"""Length of the noise schedule: the same for every Stable Diffusion XL."""


@dataclass(frozen=True)
class LossTerms:
    """Losses of a micro-batch, each float32 [B]; the perceptual one is weighted and zero where it does not apply."""

    diffusion: torch.Tensor
    perceptual: torch.Tensor | None

    @property
    def total(self) -> torch.Tensor:
        """What is minimised, [B]."""
        return self.diffusion if self.perceptual is None else self.diffusion + self.perceptual


def draw(seed: int, sample_ids: tuple[int, ...], shape: tuple[int, ...], config: LossConfig, dropout: float) -> Draws:
    """Draw everything random for the samples with these global indices. shape: (C, h, w)."""
    rows = []
    for sample_id in sample_ids:
        source = generator(seed, "sample", sample_id)
        uniform = torch.rand(2, generator=source, dtype=torch.float64)
        normal = torch.randn(2, *shape, generator=source)
        offset = torch.randn(shape[0], 1, 1, generator=source)  # Guttenberg 2023: a shift of a whole channel
        rows.append((uniform, normal[0], normal[1] + config.noise_offset * offset))
    uniforms = torch.stack([row[0] for row in rows])
    return Draws(
        dropped=uniforms[:, 0] < dropout,
        timesteps=(uniforms[:, 1] * TIMESTEPS).long(),
        posterior=torch.stack([row[1] for row in rows]),
        noise=torch.stack([row[2] for row in rows]),
    )


class Objective:
    """The training loss of a diffusion UNet.

    Args:
        scheduler_config: the base's own scheduler configuration: betas, terminal SNR and prediction type.
        config: what to change of it.
        perceptual: the optional auxiliary term.

    Raises:
        UserError: for a base whose prediction type is neither epsilon nor v_prediction.
    """

    def __init__(
        self, scheduler_config: dict[str, Any], config: LossConfig, perceptual: PerceptualTerm | None = None
    ) -> None:
        self.scheduler: Any = DDPMScheduler.from_config(scheduler_config)
        self.prediction_type = config.prediction_type or self.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"the base predicts {self.prediction_type!r}: set --loss.prediction_type epsilon or v_prediction"
            )
        self.min_snr_gamma = config.min_snr_gamma
        self.perceptual = perceptual

    def __call__(
        self, unet: nn.Module, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, told: Conditioning
    ) -> LossTerms:
        """Weighted loss terms. latents, noise: [B, C, h, w]; timesteps: int64 [B]."""
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prediction = predict(unet, noisy, timesteps, told)
        diffusion = self._squared_error(prediction, latents, noise, timesteps) * self.weights(timesteps)
        if self.perceptual is None:
            return LossTerms(diffusion, None)
        clean = self.clean_latents(prediction, noisy, timesteps)
        return LossTerms(diffusion, self.perceptual(clean, latents, timesteps))

    def unweighted(
        self, unet: nn.Module, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, told: Conditioning
    ) -> torch.Tensor:
        """The plain squared error of each sample, [B]: what validation compares over epochs."""
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        return self._squared_error(predict(unet, noisy, timesteps, told), latents, noise, timesteps)

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Min-SNR-gamma weights [B] (Hang et al. 2023, equation 6 and its v-prediction form), or ones."""
        if self.min_snr_gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        snr: torch.Tensor = compute_snr(self.scheduler, timesteps).float()
        clipped = snr.clamp(max=self.min_snr_gamma)
        if self.prediction_type == "v_prediction":
            return clipped / (snr + 1.0)
        # At zero terminal SNR the ratio is 0/0; its limit is 1.
        return torch.where(snr > 0, clipped / snr.clamp(min=torch.finfo(snr.dtype).tiny), torch.ones_like(snr))

    def clean_latents(self, prediction: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The predicted z0, [B, C, h, w], with gradient."""
        alphas: torch.Tensor = self.scheduler.alphas_cumprod.to(noisy.device)[timesteps].float().view(-1, 1, 1, 1)
        if self.prediction_type == "v_prediction":
            return alphas.sqrt() * noisy - (1.0 - alphas).sqrt() * prediction
        return (noisy - (1.0 - alphas).sqrt() * prediction) / alphas.sqrt()

    def _squared_error(
        self, prediction: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        target = noise
        if self.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        return (prediction.float() - target.float()).pow(2).mean(dim=(1, 2, 3))


def predict(unet: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, told: Conditioning) -> torch.Tensor:
    """The UNet's output [B, C, h, w]."""
    added = {"text_embeds": told.pooled, "time_ids": told.time_ids}
    output: torch.Tensor = unet(
        noisy, timesteps, encoder_hidden_states=told.embeddings, added_cond_kwargs=added, return_dict=False
    )[0]
    return output
