"""How the zoo puts faults in: components around the real training, doctored records and folders of pictures."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.zoo_lab import Exhibit, Injection, Lab, Patch, silent_since
from dfu_mlflow import evaluator, trainer
from dfu_mlflow.base.autoencoder import VaeEncoder
from dfu_mlflow.base.load import BaseModel, load_base
from dfu_mlflow.batches import Batches
from dfu_mlflow.conditioning import Conditioner, encode_prompts
from dfu_mlflow.data import RowCache, encode_latents, evaluation_pixels, load_split
from dfu_mlflow.data.phantom import write_phantom
from dfu_mlflow.diagnosis.text_variants import text_variants
from dfu_mlflow.evaluator import Drawn, Evaluator
from dfu_mlflow.objective import TIMESTEPS, LossTerms, Objective
from dfu_mlflow.perceptual import PerceptualTerm
from dfu_mlflow.preparation import read_source
from dfu_mlflow.schedules import lr_factor
from dfu_mlflow.types import Batch
from dfu_mlflow.validation import ValidationGrid, grid_rows

PICTURES = 48
"""In a doctored folder."""


def in_place_of(target: Any, name: str, make: Callable[[], Any]) -> Patch:
    """A patch that sets `target.name` to what `make` gives, anew for each training."""

    @contextmanager
    def patched() -> Iterator[None]:
        kept = getattr(target, name)
        setattr(target, name, make())
        try:
            yield
        finally:
            setattr(target, name, kept)

    return patched


def dead_term() -> Patch:
    """The perceptual term computed without gradient."""
    sound = PerceptualTerm.__call__

    def dead(self: PerceptualTerm, *told: torch.Tensor) -> torch.Tensor:
        return sound(self, *told).detach()

    return in_place_of(PerceptualTerm, "__call__", lambda: dead)


def metric_sees(change: Callable[[np.ndarray], np.ndarray]) -> Patch:
    """Pictures changed between sampler and features."""
    sound = evaluator.extract

    def fed(panels: Any, drawn: Drawn, *rest: Any) -> tuple[torch.Tensor, ...]:
        return sound(panels, replace(drawn, images=change(drawn.images)), *rest)

    return in_place_of(evaluator, "extract", lambda: fed)


def wrapped(images: np.ndarray) -> np.ndarray:
    """Multiplied by 255 twice: bytes wrap."""
    return (images.astype(np.int64) * 255).astype(np.uint8)


def trained_on(variant: str) -> Patch:
    """Training told the prompts in a wrong encoding; sampling uses the right one.

    The embedded base has one vocabulary and one padding for both encoders, so feeding encoder 1's ids to encoder 2
    changes nothing in it: `final_layer` stands in for it.
    """
    sound = Conditioner.training

    def make() -> Any:
        pipe = load_base("tiny_sdxl")
        known: dict[tuple[str, ...], Conditioner] = {}

        def told(self: Conditioner, *rows: torch.Tensor) -> Any:
            if self.prompts not in known:
                right = encode_prompts(pipe, dict(zip(self.classes, self.prompts, strict=True)), "")
                known[self.prompts] = {each.name: each.told for each in text_variants(pipe, right)}[variant]
            return sound(known[self.prompts], *rows)

        return told

    return in_place_of(Conditioner, "training", make)


def not_finite(every: int, start: int) -> Patch:
    """A loss that is NaN at each `every`-th call from `start` on."""
    sound = Objective.__call__

    def make() -> Any:
        calls = itertools.count()

        def broken(self: Objective, *told: Any) -> LossTerms:
            terms, call = sound(self, *told), next(calls)
            ill = call >= start and call % every == 0
            return replace(terms, diffusion=terms.diffusion * float("nan")) if ill else terms

        return broken

    return in_place_of(Objective, "__call__", make)


def random_validation(images: int) -> Patch:
    """Validation at timesteps and noise that are drawn anew each time."""
    sound = Evaluator.losses

    def make() -> Any:
        calls = itertools.count(1)

        def losses(self: Evaluator) -> torch.Tensor:
            kept, call = self.grid, next(calls)
            source = torch.Generator().manual_seed(call + 1000 * self.config.seed)
            rows = torch.randint(len(kept.latents), (images,), generator=source)
            steps = torch.randint(TIMESTEPS, (4,), generator=source)
            self.grid = ValidationGrid(kept.latents[rows], kept.class_ids[rows], kept.time_ids[rows], steps, call)
            try:
                return sound(self)
            finally:
                self.grid = kept

        return losses

    return in_place_of(Evaluator, "losses", make)


def other_pictures_each_epoch() -> Patch:
    """Evaluation pictures from other seeds each time."""
    sound = Evaluator.draw

    def make() -> Any:
        calls = itertools.count(1)

        def draw(self: Evaluator, *told: Any) -> Drawn:
            self.config = self.config.model_copy(update={"seed": self.config.seed + next(calls)})
            return sound(self, *told)

        return draw

    return in_place_of(Evaluator, "draw", make)


def out_of_memory(at: int, error: Callable[[], Exception]) -> Patch:
    """Memory runs out when pictures are drawn for the `at`-th time."""
    sound = Evaluator.draw

    def make() -> Any:
        calls = itertools.count(1)

        def draw(self: Evaluator, *told: Any) -> Drawn:
            if next(calls) == at:
                raise error()
            return sound(self, *told)

        return draw

    return in_place_of(Evaluator, "draw", make)


def labels_mixed(share: float) -> Patch:
    """Class ids of this share of the samples are drawn at random."""
    sound = Batches._batch

    def mixed(self: Batches, rows: np.ndarray, sample_ids: range) -> Batch:
        batch = sound(self, rows, sample_ids)
        source = torch.Generator().manual_seed(sample_ids[0])
        other = torch.randint(int(self.latents.class_ids.max()) + 1, batch.class_ids.shape, generator=source)
        chosen = torch.rand(len(other), generator=source) < share
        return replace(batch, class_ids=torch.where(chosen, other, batch.class_ids))

    return in_place_of(Batches, "_batch", lambda: mixed)


def schedule_too_long(times: float) -> Patch:
    """The scheduler's length counted in something smaller than updates."""

    def stretched(schedule: Any, step: int, warmup: int, total: int) -> float:
        return lr_factor(schedule, step, warmup, round(times * total))

    return in_place_of(trainer, "lr_factor", lambda: stretched)


class Forgetful:
    """Another autoencoder under the name of this one: what a cache keyed by arguments reuses."""

    def __init__(self, encoder: VaeEncoder) -> None:
        self.encoder, self.identity = encoder, encoder.identity

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Moments that another autoencoder would give."""
        return 1.3 * self.encoder(pixels)


def stale(lab: Lab, seed: int, every: int) -> Injection:
    """A cache in which each `every`-th photograph's latents are another autoencoder's."""
    folder = lab.folder / f"stale-{seed}-{every}"
    lab.healthy(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(lab.cache, folder, ignore=shutil.ignore_patterns("latents*"))
    config = lab.config(seed, {"data.cache_dir": str(folder)})
    base = BaseModel(config.base_model)
    encoder: Any = Forgetful(VaeEncoder(base.vae(), base.digest("vae")))
    records = read_source(config).split.train[::every]
    encode_latents(records, config.data, config.seed, RowCache(folder), encoder)
    return Injection({"data.cache_dir": str(folder)})


def split_by_image(lab: Lab, seed: int, nameless: float) -> Injection:
    """A folder split by image; this share of its files has names that say nothing."""
    folder = lab.folder / f"photographs-{seed}-{nameless:g}"
    if not folder.is_dir():
        write_phantom(folder, patients=40, seed=seed)
        source = random.Random(seed)
        for path in sorted(folder.rglob("*.png")):
            if source.random() < nameless:
                path.rename(path.with_name(f"{source.getrandbits(64):016x}.png"))
    return Injection({"data.root": str(folder), "data.group_by": "none"})


def copies(lab: Lab, seed: int, share: float) -> Exhibit:
    """Pictures of which this share are training photographs, the others photographs of other patients."""
    config = lab.config(seed, {})
    split = load_split(config.data, config.seed)[0]
    count = round(PICTURES * share)
    copied, others = (
        [side[row] for row in grid_rows(len(side), wanted).tolist()]
        for side, wanted in ((split.train, count), (split.held_out, PICTURES - count))
    )
    chosen = [*copied, *others]
    folder = lab.folder / f"copies-{seed}-{share:g}"
    for number, image in enumerate(evaluation_pixels(chosen, config.data).numpy()):
        path = folder / chosen[number].label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return Exhibit(lab.healthy(seed), Path(folder))


def ranks_that_draw(lab: Lab, seed: int, digests: str) -> Exhibit:
    """The record of a run on several ranks, one letter a digest of a rank's draws."""
    tags = {f"draws.rank{rank}": digest * 16 for rank, digest in enumerate(digests)}
    run_id = lab.twin(lab.healthy(seed), lambda name, step: True, tags)
    lab.end(run_id, "FINISHED")
    return Exhibit(run_id)


def hanging(lab: Lab, seed: int, reason: str) -> Exhibit:
    """The record of a run on four ranks that stopped where the last evaluation begins."""
    tags = {f"draws.rank{rank}": f"{rank}" * 16 for rank in range(4)} | silent_since(7200.0)
    last = int(lab.config(seed, {}).train.epochs)
    healthy = lab.healthy(seed)
    run_id = lab.twin(healthy, lambda name, step: name.startswith("step/") or step < last, tags)
    lab.drop_tag(run_id, "exit.reason")
    if reason:
        lab.client.set_tag(run_id, "exit.reason", reason)
        lab.end(run_id, "FAILED")
    return Exhibit(run_id)


def abandoned(lab: Lab, seed: int, silent_s: float) -> Exhibit:
    """The record of a run whose process is gone since so long, in the middle of its second epoch."""
    train = lab.config(seed, {}).train
    until = round(1.5 * int(train.steps_per_epoch or 1))
    healthy = lab.healthy(seed)
    run_id = lab.twin(
        healthy, lambda name, step: step <= (until if name.startswith("step/") else 1), silent_since(silent_s)
    )
    lab.drop_tag(run_id, "exit.reason")
    return Exhibit(run_id)


def doctored(make: Callable[..., Exhibit], *told: Any) -> Injection:
    """No training of its own."""
    return Injection(doctored=lambda lab, seed: make(lab, seed, *told))
