"""The heavy side of a case: base, photographs, fine-tuned weights and pictures, each loaded when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dfu_mlflow.base.load import BaseModel
from dfu_mlflow.base.shared_unet import UNetWeights
from dfu_mlflow.bundle_format import Settings
from dfu_mlflow.conditioning import Conditioner, encode_prompts
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.data import evaluation_pixels, load_split
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.diagnosis.weight_changes import Change, Movement, measure, read_change
from dfu_mlflow.diagnosis.weights import WeightFiles
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.extractors.base import NetworkExtractor
from dfu_mlflow.metrics.extractors.efficientnet import efficientnet_lite0
from dfu_mlflow.objective import Objective
from dfu_mlflow.phases import phase
from dfu_mlflow.preparation import Material, prepare, read_source, sampling_settings
from dfu_mlflow.ranks import Ranks
from dfu_mlflow.runtime import derive_seed, release_memory
from dfu_mlflow.sampling import Sampler
from dfu_mlflow.subject import Pictures, read_pictures
from dfu_mlflow.tracking import masked
from dfu_mlflow.types import Split
from dfu_mlflow.validation import ValidationGrid, grid_rows, validation_losses

Shown = Literal["live", "ema"]
PICTURES = 48
"""Drawn for a probe, over all classes: enough for a kernel distance with an interval, seconds on the embedded base."""
REDRAWS = 4
NO_ROOM = "{} does not fit the card's memory: --device cpu has more room, and takes longer"


class Bench:
    """What probes work on.

    Args:
        config: base, photographs, sampling settings.
        files: the fine-tuned weights, or why there are none.
        shown: which weights the run's samples came from.
        folder: pictures that the run drew, None to draw them.
        embeddings: file of the text embeddings that the run trained on, None where it is not given.
        updates: optimizer updates done, None where it is not known.
        unnamed: `base`, `photographs`, `resolution`, `prompts`, `sampling`, `split` or `cache` -> what to say, where
            nobody named it and this project's own would be a wrong one.
    """

    def __init__(
        self,
        config: RunConfig,
        files: WeightFiles | str,
        shown: Shown = "live",
        folder: Path | None = None,
        embeddings: Path | None = None,
        updates: int | None = None,
        unnamed: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.unnamed = unnamed or {}
        self.files = files
        self.shown = shown
        self.folder = folder
        self.embeddings = embeddings
        self.updates = updates
        self.between_batches: Callable[[], None] = lambda: None
        self._changes: dict[Shown, Change] = {}
        self._movement: dict[Shown, Movement] = {}
        self._losses: dict[str, torch.Tensor] = {}

    @property
    def has_weights(self) -> bool:
        """Fine-tuned weights were given."""
        return isinstance(self.files, WeightFiles)

    @property
    def has_ema(self) -> bool:
        """Averaged weights lie beside the live ones."""
        return isinstance(self.files, WeightFiles) and self.files.ema is not None

    @property
    def material(self) -> Material:
        """Base, photographs and latents; `Lacking` where one of them cannot be had."""
        self.require("base", "photographs", "resolution")
        if isinstance(self._prepared, str):
            raise Lacking(self._prepared)
        return self._prepared

    @cached_property
    def _prepared(self) -> Material | str:
        """The same, or why there is none: asked by many checks, and each try takes minutes."""
        with suppress(torch.OutOfMemoryError):  # what was loaded is released outside: the traceback holds on to it
            try:
                return prepare(self.config, read_source(self.config))
            except UserError as error:
                return masked(error)
        release_memory()
        return NO_ROOM.format("the base")

    @cached_property
    def split(self) -> Split:
        """Photographs by side; needs no base."""
        self.require("photographs")
        try:
            return load_split(self.config.data, self.config.seed)[0]
        except UserError as error:
            raise Lacking(masked(error)) from None

    @property
    def has_base(self) -> bool:
        """Base and photographs can be loaded."""
        try:
            return bool(self.material)
        except Lacking:
            return False

    @cached_property
    def base(self) -> BaseModel:
        """The untouched base; it needs no photographs."""
        if self.has_base:
            return self.material.base
        self.require("base")
        try:
            return BaseModel(self.config.base_model)
        except UserError as error:
            raise Lacking(masked(error)) from None

    def movement(self, shown: Shown) -> Movement:
        """How far live or averaged weights have come."""
        if shown not in self._movement:
            self._movement[shown] = measure(self._file(shown), self.base, self._files().alpha)
        return self._movement[shown]

    def movement_if_known(self, shown: Shown) -> Movement | None:
        """The same, None where base or weights cannot be had: the curves may tell instead."""
        try:
            return self.movement(shown)
        except Lacking:
            return None

    def unet(self, who: Literal["base", "live", "ema"]) -> Any:
        """The one UNet in memory with these weights, until others are asked for."""
        weights = UNetWeights(self.material.base, None if who == "base" else self._change(who))
        with suppress(torch.OutOfMemoryError):
            try:
                return self.material.shared_unet.hold(weights)
            except UserError as error:
                raise Lacking(masked(error)) from None
        self.material.shared_unet.release()
        raise Lacking(NO_ROOM.format("the UNet"))

    def sampler(self, shown: Shown, settings: Settings | None = None) -> Sampler:
        """Draws with the fine-tuned weights, by the run's own settings."""
        return self.model(shown, settings, ("prompts", "sampling"))

    def model(self, shown: Shown, settings: Settings | None = None, parts: tuple[str, ...] = ("prompts",)) -> Sampler:
        """The same for losses, to which it does not matter how the run draws."""
        self.require_material(*parts)
        self._change(shown)  # says at once where there are none
        return self._sampler(shown, settings)

    def base_sampler(self, settings: Settings | None = None) -> Sampler:
        """Draws with the untouched base."""
        self.require_material("prompts", "sampling")
        return self._sampler("base", settings)

    def _sampler(self, who: Literal["base", "live", "ema"], settings: Settings | None) -> Sampler:
        material, config = self.material, self.config
        chosen = settings or sampling_settings(config, material.train)
        unet = partial(self.unet, who)
        return Sampler(material.pipe, material.conditioner, chosen, config.sampling.batch_size, unet)

    @cached_property
    def pictures(self) -> Pictures:
        """What the run draws: the pictures that were given, else drawn from the weights it shows."""
        if self.folder is not None:
            try:
                return read_pictures(self.folder, self.classes, self.config.data)
            except UserError as error:
                raise Lacking(masked(error)) from None
        ids, images = self.draw(self.sampler(self.shown))
        return Pictures(images, ids, tuple(f"seed {number}" for number in range(len(images))))

    @property
    def classes(self) -> tuple[str, ...]:
        """Class labels."""
        return self.material.source.split.classes

    def draw(
        self, sampler: Sampler, count: int = PICTURES, class_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Class ids [N] and pictures uint8 [N, H, W, 3] from fixed seeds, classes in turn or as given."""
        ids = torch.arange(max(count, 2 * len(self.classes))) % len(self.classes) if class_ids is None else class_ids
        seeds = [derive_seed(self.config.evaluation.seed, "diagnosis", number) for number in range(len(ids))]
        with phase("sampling for a probe", len(ids), "pictures") as progress:
            return ids, sampler.generate(ids, seeds, between_batches=self.between_batches, progress=progress)

    @cached_property
    def photographs(self) -> torch.Tensor:
        """Held-out photographs, uint8 [N, H, W, 3]."""
        return evaluation_pixels(self.material.source.split.held_out, self.config.data)

    @cached_property
    def extractor(self) -> NetworkExtractor:
        """The embedded features."""
        return efficientnet_lite0(self.config.metrics.extractor_size_px, self.material.device)

    @cached_property
    def photograph_features(self) -> torch.Tensor:
        """Of the held-out photographs, float64 [N, D]."""
        with phase("features of photographs"):
            return self.extractor(self.photographs)

    def grid(self, seed: int | None = None) -> ValidationGrid:
        """The validation grid of held-out photographs; another seed draws its noise anew."""
        evaluation, factor = self.config.evaluation, float(self.material.pipe.vae.config.scaling_factor)
        images, steps = evaluation.validation_images, evaluation.validation_timesteps
        return ValidationGrid.build(
            self.material.held_out, factor, images, steps, evaluation.seed if seed is None else seed
        )

    def losses(self, who: Literal["base", "live", "ema"], told: Conditioner | None = None) -> torch.Tensor:
        """Unweighted losses of the held-out grid, float64 [M, T]; with the run's own prompts unless told others."""
        if told is None and who in self._losses:
            return self._losses[who]
        pipe = self.material.pipe
        if told is None:
            self.require("prompts")
        objective = Objective(dict(pipe.scheduler.config), self.config.loss)
        losses = validation_losses(
            self.unet(who), objective, told or self.material.conditioner, self.grid(), Ranks(self.between_batches)
        )
        if told is None:
            self._losses[who] = losses
        return losses

    def by_patient(self, losses: torch.Tensor) -> torch.Tensor:
        """Means over timesteps and each patient's photographs of the grid, [P]: photographs of one patient go together,
        so an interval over them would be too narrow.

        Args:
            losses: of the held-out grid, or differences of such, [M, T].
        """
        held = self.material.source.split.held_out
        patients = [held[row].patient for row in grid_rows(len(held), self.config.evaluation.validation_images)]
        return means_by(patients, losses.mean(dim=1))

    def redraw_spread(self) -> float:
        """Relative deviation of the base's loss when each image gets one random timestep and noise, over re-draws."""
        losses = self.losses("base")
        source = torch.Generator().manual_seed(self.config.evaluation.seed)
        picks = [torch.randint(losses.shape[1], (len(losses), 1), generator=source) for _ in range(16 * REDRAWS)]
        means = torch.stack([losses.gather(1, pick).mean() for pick in picks])
        return float(means.std() / means.mean())

    def with_prompts(self, *sets: Mapping[str, str]) -> list[Conditioner]:
        """Other prompts, class label -> prompt, encoded as sampling does; the text encoders are loaded once for all."""
        material = self.material
        texts = dict.fromkeys(text for prompts in sets for text in prompts.values())
        with self.text_encoders() as pipe:
            known = encode_prompts(pipe, {text: text for text in texts}, "").to(material.device)
        rows = [torch.tensor([list(texts).index(text) for text in prompts.values()]) for prompts in sets]
        return [
            replace(
                known,
                classes=tuple(prompts),
                prompts=tuple(prompts.values()),
                embeddings=known.embeddings[own],
                pooled=known.pooled[own],
            )
            for prompts, own in zip(sets, rows, strict=True)
        ]

    @contextmanager
    def text_encoders(self) -> Iterator[Any]:
        """A pipeline that encodes prompts; one large network is in memory at a time."""
        self.material.shared_unet.release()
        with self.material.base.text_encoders() as pipe:
            yield pipe

    def settings(self, **change: Any) -> Settings:
        """The run's sampling settings with some changed."""
        return replace(sampling_settings(self.config, self.material.train), **change)

    def require(self, *parts: str) -> None:
        """Raise `Lacking` for a part that nobody named, see `unnamed`."""
        for part in parts:
            if part in self.unnamed:
                raise Lacking(self.unnamed[part])

    def require_material(self, *parts: str) -> None:
        """The same after base and photographs, whose lack is said first."""
        assert self.material
        self.require(*parts)

    def _files(self) -> WeightFiles:
        if isinstance(self.files, str):
            raise Lacking(self.files)
        return self.files

    def _file(self, shown: Shown) -> Path:
        files = self._files()
        if shown == "live":
            return files.live
        if files.ema is None:
            raise Lacking("no averaged weights lie beside the live ones")
        return files.ema

    def _change(self, shown: Shown) -> Change:
        if shown not in self._changes:
            self._changes[shown] = read_change(self._file(shown), self.base, self._files().alpha)
        return self._changes[shown]


def means_by(groups: Sequence[str], values: torch.Tensor) -> torch.Tensor:
    """Mean of the values [M] of each group, [G], groups in sorted order."""
    names = sorted(set(groups))
    own = torch.tensor([names.index(group) for group in groups])
    return torch.stack([values[own == number].mean() for number in range(len(names))])
