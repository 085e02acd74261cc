"""Pre-train UNet and text encoders of `tiny_sdxl` together on the stock-illustration world.

    python -m dfu_mlflow.base.pretraining.diffusion --minutes 45 --vae runs/vae/vae --out runs/tiny_sdxl

No phantom and no photograph is ever shown to them. Captions are dropped to zeros for 12 % of the pictures, which is
what the pipeline uses as unconditional (`force_zeros_for_empty_prompt`).
"""

import argparse
import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import EMAModel

from dfu_mlflow.base.pretraining.assemble import TOKENS, build_pipeline, save_pipeline
from dfu_mlflow.base.pretraining.autoencoder import to_tensor
from dfu_mlflow.base.pretraining.tokenizer import build_tokenizer, draw_corpus
from dfu_mlflow.base.pretraining.world import draw_scene

SIDE_PX = 64


@dataclass(frozen=True)
class Recipe:
    """What the run depends on. `minutes` drives the schedule, so that a slower machine ends with a whole cosine."""

    minutes: float
    pictures: int = 14_000
    batch: int = 32
    peak_rate: float = 1e-3
    caption_dropout: float = 0.12
    ema_decay: float = 0.998
    merges: int = 370
    seed: int = 0
    start: Path | None = None  # a pipeline of an earlier run to go on from, with a new cosine


@dataclass(frozen=True)
class WorldSet:
    """Latents float16 [N, 4, 16, 16] and token ids int64 [N, 77] of N illustrations."""

    latents: torch.Tensor
    tokens: torch.Tensor


@torch.no_grad()
def draw_world(vae: Any, pipe: Any, count: int, seed: int) -> WorldSet:
    """Draw illustrations, encode them and tokenise their captions."""
    rng = np.random.default_rng([seed, 31])
    latents, captions = [], []
    for start in range(0, count, 96):
        scenes = [draw_scene(rng, SIDE_PX) for _ in range(min(96, count - start))]
        x = to_tensor(np.stack([picture for picture, _ in scenes]))
        latents.append((vae.encode(x).latent_dist.mode() * vae.config.scaling_factor).half().contiguous())
        captions += [caption for _, caption in scenes]
    given = pipe.tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return WorldSet(torch.cat(latents), given.input_ids)


def encode_tokens(pipe: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `encode_prompt` makes of token ids [B, 77]: embeddings [B, 77, 160] and pooled [B, 96], with gradient."""
    first = pipe.text_encoder(tokens, output_hidden_states=True)
    second = pipe.text_encoder_2(tokens, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


def draw_time_ids(rng: np.random.Generator, count: int) -> torch.Tensor:
    """(height, width, top, left, target height, target width), float32 [count, 6].

    Two thirds say the truth; the rest are arbitrary, so that these numbers carry little and another original size in
    fine-tuning does no harm.
    """
    ids = np.tile(np.array([SIDE_PX, SIDE_PX, 0, 0, SIDE_PX, SIDE_PX], np.float32), (count, 1))
    other = rng.random(count) < 1 / 3
    ids[other, :2] = np.round(np.exp(rng.uniform(math.log(48), math.log(1024), (int(other.sum()), 2))))
    cropped = rng.random(count) < 0.1
    ids[cropped, 2:4] = rng.integers(0, 64, (int(cropped.sum()), 2))
    return torch.from_numpy(ids)


class Pretrainer:
    """One optimizer over UNet and text encoders, with an exponential moving average of all three."""

    def __init__(self, pipe: Any, world: WorldSet, recipe: Recipe) -> None:
        self.pipe, self.world, self.recipe = pipe, world, recipe
        self.rng = np.random.default_rng([recipe.seed, 32])
        self.noise = DDPMScheduler.from_config(pipe.scheduler.config)
        modules = (pipe.unet, pipe.text_encoder, pipe.text_encoder_2)
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, recipe.peak_rate, (0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.ema = EMAModel(self.parameters, decay=recipe.ema_decay, use_ema_warmup=True, power=0.75)

    def step(self, part: float) -> float:
        """One optimizer step; `part` is how much of the run has passed, 0..1. Returns the loss."""
        rate = self.recipe.peak_rate * min(1.0, part / 0.03 + 0.01) * 0.5 * (1 + math.cos(math.pi * min(part, 1.0)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(torch.from_numpy(self.rng.integers(0, len(self.world.latents), self.recipe.batch)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.parameters)
        return loss.item()

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        """Velocity error (Salimans and Ho 2022) at uniform timesteps, every timestep weighted alike."""
        latents = self.world.latents[rows].float()
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(rows),))
        embeddings, pooled = encode_tokens(self.pipe, self.world.tokens[rows])
        kept = torch.from_numpy(self.rng.random(len(rows)) >= self.recipe.caption_dropout).float()
        added = {"text_embeds": pooled * kept[:, None], "time_ids": draw_time_ids(self.rng, len(rows))}
        noisy = self.noise.add_noise(latents, noise, timesteps)
        guess = self.pipe.unet(noisy, timesteps, embeddings * kept[:, None, None], added_cond_kwargs=added).sample
        target = self.noise.get_velocity(latents, noise, timesteps)
        return torch.nn.functional.mse_loss(guess, target)

    def save(self, folder: Path) -> None:
        """Write the averaged weights as a pipeline."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        save_pipeline(self.pipe, folder)
        self.ema.restore(self.parameters)


def train(recipe: Recipe, vae: Any, out: Path) -> None:
    """Train, writing `out/loss_curve.csv` and, every four minutes and at the end, the pipeline `out/tiny_sdxl`."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    vae.requires_grad_(False).eval()
    pipe = _pipeline(recipe, vae, out)
    pipe.unet.to(memory_format=torch.channels_last)  # 10 % faster on a CPU
    trainer = Pretrainer(pipe, draw_world(vae, pipe, recipe.pictures, recipe.seed), recipe)
    begun, saved, losses, step = time.monotonic(), 0.0, [], 0
    with (out / "loss_curve.csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["step", "minutes", "loss"])
        while (part := (time.monotonic() - begun) / (60 * recipe.minutes)) < 1:
            losses.append(trainer.step(part))
            step += 1
            if step % 50 == 0:
                log.writerow([step, f"{part * recipe.minutes:.2f}", f"{np.mean(losses):.5f}"])
                file.flush()
                losses = []
            if time.monotonic() - begun - saved > 240:
                saved = time.monotonic() - begun
                trainer.save(out / "tiny_sdxl")
    trainer.save(out / "tiny_sdxl")


def _pipeline(recipe: Recipe, vae: Any, out: Path) -> Any:
    if recipe.start is not None:
        return StableDiffusionXLPipeline.from_pretrained(
            recipe.start, vae=vae, dtype=torch.float32, add_watermarker=False
        )
    # The vocabulary is always that of seed 0: another seed is another run on the same language.
    return build_pipeline(vae, build_tokenizer(draw_corpus(4000, 0), recipe.merges, out / "tokenizer"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--pictures", type=int, default=14_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="go on from this pipeline; give another seed")
    given = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(given.vae, dtype=torch.float32)
    train(Recipe(given.minutes, given.pictures, seed=given.seed, start=given.start), vae, given.out)


if __name__ == "__main__":
    main()
