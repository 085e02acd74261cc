"""Seeded generation: the same code draws for evaluation, for `sample` and for the server.

An image depends on (model, class, seed, settings) alone, not on the batch it was drawn in: the first noise comes from
the image's own seed.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import diffusers
import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from dfu_mlflow.base.shared_unet import SharedUNet, UNetWeights
from dfu_mlflow.bundle_format import Settings, open_bundle
from dfu_mlflow.conditioning import Conditioner, encode_prompts
from dfu_mlflow.denoising import Guidance, Solver, decode, denoise
from dfu_mlflow.errors import UserError
from dfu_mlflow.phases import Progress
from dfu_mlflow.runtime import generator, in_slices, pick_device, release_memory
from dfu_mlflow.types import Conditioning, Pipeline

logger = logging.getLogger(__name__)


def build_scheduler(config: dict[str, Any], name: str, prediction_type: str | None) -> Any:
    """A fresh solver (they carry state from step to step) on the base's own noise schedule."""
    kinds = {
        "ddim": DDIMScheduler,
        "euler": EulerDiscreteScheduler,
        "dpmpp_2m": DPMSolverMultistepScheduler,
        "unipc": UniPCMultistepScheduler,
    }
    change = {} if prediction_type is None else {"prediction_type": prediction_type}
    if name == "base":
        return getattr(diffusers, str(config["_class_name"])).from_config(config, **change)
    return kinds[name].from_config(config, **change)


def _draw_batch(
    sampler: Sampler,
    class_ids: torch.Tensor,
    seeds: Sequence[int],
    settings: Settings,
    scales: torch.Tensor,
    after_step: Callable[[], None] | None = None,
) -> np.ndarray:
    pipe, unet = sampler.pipe, sampler.unet
    edge = settings.resolution_px // pipe.vae_scale_factor
    shape = (int(unet.config.in_channels), edge, edge)
    sources = [generator(seed, "image") for seed in seeds]
    noise = torch.stack([torch.randn(shape, generator=source) for source in sources])
    noise = noise.to(unet.device, unet.dtype)
    size = (settings.resolution_px, settings.resolution_px)
    time_ids = torch.tensor([[*settings.original_size_px, 0, 0, *size]], dtype=torch.float32, device=noise.device)
    time_ids = time_ids.expand(len(seeds), -1)
    told = sampler.conditioner.sampling(class_ids)
    prompts = Conditioning(told["prompt_embeds"], told["pooled_prompt_embeds"], time_ids)
    guidance = None
    if settings.guided:
        empty = Conditioning(told["negative_prompt_embeds"], told["negative_pooled_prompt_embeds"], time_ids)
        guidance = Guidance(empty, scales.to(noise.device), settings.guidance_rescale)
    scheduler = build_scheduler(dict(pipe.scheduler.config), settings.scheduler, settings.prediction_type)
    solver = Solver(scheduler, _step_keywords(scheduler, sources), after_step)
    latents = denoise(
        unet, solver, settings.num_inference_steps, noise, prompts, guidance, keep_prompts=not sampler.filled_to
    )
    pixels: np.ndarray = decode(pipe.vae, latents).numpy()
    return pixels


def _step_keywords(scheduler: Any, sources: list[torch.Generator]) -> dict[str, Any]:
    """Solvers that add noise take it from each picture's own generator."""
    return {"generator": sources} if "generator" in inspect.signature(scheduler.step).parameters else {}


class _Moves:
    """Moves a phase that counts pictures with each solver step: one step of a large network takes seconds."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.steps, self.start = progress, steps, progress.done

    def in_batch(self, rows: slice, also: Callable[[], None] | None) -> Callable[[], None]:
        """What to call after each step of a batch; `also` is called before."""
        made = 0

        def step() -> None:
            nonlocal made
            if also is not None:
                also()
            made += 1
            self.progress.reach(self.start + rows.start + (rows.stop - rows.start) * min(1.0, made / self.steps))

        return step


class Sampler:
    """A fine-tuned model that draws pictures by class label: what the registry packages and serves.

    Args:
        pipe: the base with the fine-tuned weights in it.
        conditioner: its encoded prompts.
        settings: the defaults.
        batch_size: images drawn at a time.
        unet: gives the UNet where it is shared with other models; None takes the pipeline's own.

    Attributes:
        filled_to: batches are filled up to this many rows before they are drawn; 0 leaves them as they are.
    """

    def __init__(
        self,
        pipe: Pipeline,
        conditioner: Conditioner,
        settings: Settings,
        batch_size: int,
        unet: Callable[[], Any] | None = None,
    ) -> None:
        self.pipe = pipe
        self.unet_source = unet
        self.conditioner = conditioner
        self.settings = settings
        self.batch_size = batch_size
        self.filled_to = 0

    def compile(self) -> None:
        """Let `torch.compile` make the UNet's kernels: minutes at the first batch, shorter ones from then on.

        Batches of fewer than `batch_size` rows are filled up from now on, since another size would be compiled anew.
        """
        self.filled_to = self.batch_size
        self.unet.compile()

    @property
    def unet(self) -> Any:
        """The UNet with this model's weights in it, until another model that shares it asks for its own."""
        return self.pipe.unet if self.unet_source is None else self.unet_source()

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels that can be drawn."""
        return self.conditioner.classes

    @property
    def defaults(self) -> dict[str, float | int]:
        """Guidance and steps that `draw` uses when not told others."""
        return {
            "guidance_scale": self.settings.guidance_scale,
            "num_inference_steps": self.settings.num_inference_steps,
        }

    def draw(
        self,
        labels: Sequence[str],
        seeds: Sequence[int],
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
    ) -> np.ndarray:
        """One image for each (label, seed): uint8 [N, H, W, 3].

        Raises:
            UserError: for a label the model does not know, or labels and seeds of different length.
        """
        unknown = sorted(set(labels) - set(self.classes))
        if unknown:
            raise UserError(f"unknown class {', '.join(unknown)}: this model draws {', '.join(self.classes)}")
        if len(labels) != len(seeds):
            raise UserError(f"{len(labels)} labels but {len(seeds)} seeds: give one seed an image")
        settings = self.settings_with(guidance_scale, num_inference_steps)
        ids = torch.tensor([self.classes.index(label) for label in labels])
        return self.generate(ids, seeds, settings)

    def settings_with(self, guidance_scale: float | None, num_inference_steps: int | None) -> Settings:
        """The defaults with what was asked for in their place."""
        wanted: dict[str, Any] = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
        return replace(self.settings, **{name: value for name, value in wanted.items() if value is not None})

    @torch.inference_mode()
    def generate(
        self,
        class_ids: torch.Tensor,
        seeds: Sequence[int],
        settings: Settings | None = None,
        between_batches: Callable[[], None] | None = None,
        between_steps: Callable[[], None] | None = None,
        guidance_scales: Sequence[float] | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Draw one image for each (class id, seed).

        Args:
            class_ids: int64 [N].
            settings: None takes the defaults.
            between_batches: called before each batch; raises to stop.
            between_steps: called after each solver step; raises to stop.
            guidance_scales: one a picture, on the same side of 1 as the settings' own; None takes that.
            progress: of a phase that counts pictures; each solver step moves it.

        Returns:
            uint8 [N, H, W, 3].
        """
        settings = settings or self.settings
        moves = None if progress is None else _Moves(progress, settings.num_inference_steps)
        scales = torch.tensor(guidance_scales or [settings.guidance_scale] * len(seeds), dtype=torch.float32)

        def images_of(rows: slice) -> np.ndarray:
            if between_batches is not None:
                between_batches()
            ids = list(range(*rows.indices(len(seeds))))
            ids += ids[-1:] * (self.filled_to - len(ids))
            after_step = between_steps if moves is None else moves.in_batch(rows, between_steps)
            drawn = _draw_batch(self, class_ids[ids], [seeds[row] for row in ids], settings, scales[ids], after_step)
            return drawn[: rows.stop - rows.start]

        if not self.filled_to:
            return np.concatenate(in_slices(len(seeds), self.batch_size, images_of))
        while True:  # `in_slices` would go on with fewer rows, which would be filled up again
            starts = range(0, len(seeds), self.filled_to)
            parts = [slice(start, min(start + self.filled_to, len(seeds))) for start in starts]
            try:
                return np.concatenate([images_of(part) for part in parts])
            except torch.OutOfMemoryError:
                if self.filled_to == 1:
                    raise
            self.batch_size = self.filled_to = self.filled_to // 2
            release_memory()
            logger.warning("out of memory: batches of %d from now on, compiled anew", self.filled_to)

    @classmethod
    def load(cls, bundle: Path, device: str = "auto") -> Self:
        """Open what `dfu_mlflow.bundle.write_bundle` wrote.

        Raises:
            UserError: when the folder is no bundle, or its base is missing or another one.

        It draws in the precision that training evaluated it in. One network is loaded at a time: the text encoders,
        which are given up, the autoencoder, the UNet.
        """
        opened, target = open_bundle(bundle), pick_device(device)
        conditioner = encode_prompts(opened.base, opened.prompts, opened.negative_prompt)
        pipe = opened.base.pipeline()
        unet = SharedUNet(target, opened.mixed_precision).hold(UNetWeights(opened.base, opened.tuned))
        pipe.register_modules(vae=opened.base.vae().to(target), unet=unet)
        return cls(pipe, conditioner.to(target), opened.settings, opened.batch_size)
