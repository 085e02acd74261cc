"""The base's autoencoder as the data layer needs it: pixels in, posterior moments out."""

from __future__ import annotations

from typing import Any

import torch


class VaeEncoder:
    """Encodes photographs; satisfies `dfu_mlflow.data.dataset.LatentEncoder`.

    Args:
        vae: AutoencoderKL; float32, because SDXL's own overflows in half precision.
        digest: of its weights (`part_digest`).
    """

    def __init__(self, vae: Any, digest: str) -> None:
        self.vae = vae
        self._identity = f"{digest[:32]}-{str(vae.dtype).removeprefix('torch.')}"

    @property
    def identity(self) -> str:
        """Digest of the weights, and the dtype."""
        return self._identity

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 2C, h, w]: mean and standard deviation of the posterior, unscaled."""
        posterior = self.vae.encode(to_signed(pixels).to(self.vae.device, self.vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float().cpu()


@torch.no_grad()
def restore(vae: Any, means: torch.Tensor) -> torch.Tensor:
    """Photographs as the autoencoder gives them back, from their encoding: no sampler on it does better.

    Args:
        means: of the posterior, unscaled, [B, C, h, w].

    Returns:
        uint8 [B, H, W, 3].
    """
    decoded = vae.decode(means.to(vae.device, vae.dtype), return_dict=False)[0]
    restored: torch.Tensor = ((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()
    return restored


def to_signed(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in -1..1."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0
