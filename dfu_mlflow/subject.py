"""What an evaluation is about: a checkpoint, a packaged sampler, a pipeline of the family, or a folder of pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image

from dfu_mlflow.base.load import BaseModel, with_networks
from dfu_mlflow.base.shared_unet import FineTune, UNetWeights
from dfu_mlflow.bundle_format import BUNDLE, Settings, open_bundle
from dfu_mlflow.checkpoint import STATE, CheckpointStore
from dfu_mlflow.conditioning import encode_prompts
from dfu_mlflow.config.schema import DataConfig, RunConfig
from dfu_mlflow.data import evaluation_pixels
from dfu_mlflow.data.images import load_rgb
from dfu_mlflow.documents import read_document
from dfu_mlflow.errors import UserError
from dfu_mlflow.preparation import Material, embedding_cache, sampling_settings
from dfu_mlflow.sampling import Sampler
from dfu_mlflow.types import Record

Weights = Literal["best", "live", "ema"]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Pictures:
    """Pictures from a folder.

    Attributes:
        images: uint8 [N, H, W, 3].
        class_ids: int64 [N], positions among the photographs' classes.
        names: file of each.
        size_px: (width, height) of the files; (0, 0) where there are none.
    """

    images: np.ndarray
    class_ids: torch.Tensor
    names: tuple[str, ...]
    size_px: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Subject:
    """What is evaluated: one of `sampler` and `pictures` is there.

    Attributes:
        name: as the user called it.
        shown: `live`, `ema`, `pipeline` or `files`.
        sampler: draws the pictures.
        pictures: drawn already.
    """

    name: str
    shown: str
    sampler: Sampler | None = None
    pictures: Pictures | None = None


def local_configuration(source: Path) -> dict[str, Any] | None:
    """The configuration that a checkpoint or a training run's folder was made with, None for what knows none."""
    state = _state(source)
    return None if state is None else dict(state["config"])


def local_data_digest(source: Path) -> str | None:
    """Digest of the photographs and the split that a checkpoint or a run's folder was trained on, None as above."""
    state = _state(source)
    return None if state is None else str(state["data"])


def _state(source: Path) -> dict[str, Any] | None:
    if (source / CHECKPOINTS).is_dir():
        complete = CheckpointStore(source / CHECKPOINTS, keep_last=1).complete()
        return _state(complete[-1]) if complete else None
    return read_document(source / STATE, "checkpoint") if (source / STATE).is_file() else None


def open_subject(source: Path, config: RunConfig, material: Material, weights: Weights = "best") -> Subject:
    """Open a folder by what it holds.

    Args:
        source: a checkpoint (`state.json`), a training run's folder (`checkpoints/`), a sampler bundle
            (`sampler.json`), a diffusers pipeline (`model_index.json`), or a folder with a sub-folder of pictures for
            each class.
        config: sampling settings, the adapter of a checkpoint, prompts of a pipeline.
        material: classes and prompts of the photographs.
        weights: of a checkpoint; `best` is what the run judged better.

    Raises:
        UserError: for a folder that is none of these.
    """
    if (source / CHECKPOINTS).is_dir():
        return _open_run(source, config, material, weights)
    if (source / STATE).is_file():
        return open_checkpoint(source, config, material, weights)
    if (source / BUNDLE).is_file():
        return _open_bundle(source, material)
    if (source / "model_index.json").is_file():
        pipeline = UNetWeights(BaseModel(str(source), material.base.digests))
        return Subject(str(source), "pipeline", _sampler(pipeline, config, material))
    if source.is_dir():
        pictures = read_pictures(source, material.source.split.classes, config.data)
        (width, height), side = pictures.size_px, config.data.resolution_px
        resized = "" if (width, height) == (side, side) else f" ({width}x{height}, seen at {side}x{side})"
        return Subject(f"{source}{resized}", "files", pictures=pictures)
    raise no_such_source(str(source))


def no_such_source(source: str) -> UserError:
    """What can be evaluated, for a person who named something else."""
    return UserError(
        f"--source {source} is no folder: give a checkpoint, a training run's folder, a diffusers pipeline, a folder "
        "with a sub-folder of pictures for each class, an MLflow run or model, or models:/NAME@ALIAS"
    )


def open_checkpoint(folder: Path, config: RunConfig, material: Material, weights: Weights) -> Subject:
    """The sampler of one checkpoint.

    Raises:
        UserError: for weights that the checkpoint does not hold.
    """
    best = CheckpointStore(folder.parent, keep_last=1).best()
    judged = str(best["shown"]) if best and best["checkpoint"] == folder.name else "live"
    shown = judged if weights == "best" else weights
    file = folder / ("ema.safetensors" if shown == "ema" else "weights.safetensors")
    if not file.is_file():
        raise UserError(f"{folder} holds no {shown} weights ({file.name})")
    weights_of = UNetWeights(material.base, FineTune(config.adapter, file))
    return Subject(f"{folder} ({shown} weights)", shown, _sampler(weights_of, config, material))


def read_pictures(folder: Path, classes: Sequence[str], data: DataConfig) -> Pictures:
    """Every visible picture below `folder/CLASS/`, as photographs are seen: central square, `data.resolution_px`.

    Raises:
        UserError: for a class without a folder, a folder without pictures, files that do not decode, or pictures of
            unlike size or smaller than photographs are seen.
    """
    missing = [label for label in classes if not (folder / label).is_dir()]
    if missing:
        needed = ", ".join(classes)
        raise UserError(f"--source {folder} has no sub-folder for class {', '.join(missing)}: needed are {needed}")
    files = {label: _visible_pictures(folder / label) for label in classes}
    sizes = Counter(_size(path) for paths in files.values() for path in paths)
    if len(sizes) > 1:
        found = ", ".join(f"{count} of {width}x{height}" for (width, height), count in sizes.most_common(4))
        raise UserError(f"--source {folder} holds pictures of {len(sizes)} sizes ({found}): make them one size")
    ((width, height),) = sizes
    if min(width, height) < data.resolution_px:
        raise UserError(
            f"--source {folder} holds pictures of {width}x{height}, smaller than --data.resolution_px "
            f"{data.resolution_px}: name the resolution that they were made for"
        )
    records = [Record(path, label, "", "", (width, height)) for label, paths in files.items() for path in paths]
    return Pictures(
        images=evaluation_pixels(records, data).numpy(),
        class_ids=torch.tensor([classes.index(record.label) for record in records]),
        names=tuple(str(record.path.relative_to(folder)) for record in records),
        size_px=(width, height),
    )


def _visible_pictures(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    visible = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not visible:
        raise UserError(f"--source {folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    return visible


def _size(path: Path) -> tuple[int, int]:
    """(width, height) as shown, from the file's head."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception:  # any: what is wrong is told by decoding it
        height, width = load_rgb(path).shape[:2]
        return width, height
    return (height, width) if turned else (width, height)


def with_settings(subject: Subject, change: Mapping[str, Any]) -> Subject:
    """The same sampler with other settings, where the user typed some."""
    if subject.sampler is None or not change:
        return subject
    known = {key: value for key, value in change.items() if key in Settings.__dataclass_fields__}
    sampler = subject.sampler
    settings, batch_size = replace(sampler.settings, **known), int(change.get("batch_size", sampler.batch_size))
    changed = Sampler(sampler.pipe, sampler.conditioner, settings, batch_size, sampler.unet_source)
    return replace(subject, sampler=changed)


def base_sampler(config: RunConfig, material: Material) -> Sampler:
    """The untouched base with the configured prompts and settings."""
    settings, weights = sampling_settings(config, material.train), UNetWeights(material.base)
    unet = partial(material.shared_unet.hold, weights)
    return Sampler(material.pipe, material.conditioner, settings, config.sampling.batch_size, unet)


def _open_run(folder: Path, config: RunConfig, material: Material, weights: Weights) -> Subject:
    store = CheckpointStore(folder / CHECKPOINTS, keep_last=1)
    best, complete = store.best(), store.complete()
    if not complete:
        raise UserError(f"--source {folder} holds no whole checkpoint")
    chosen = store.folder / str(best["checkpoint"]) if best else complete[-1]
    return open_checkpoint(chosen, config, material, weights)


def _open_bundle(source: Path, material: Material) -> Subject:
    bundle = open_bundle(source, material.base.digests)
    weights = UNetWeights(bundle.base, bundle.tuned)
    texts = bundle.prompts, bundle.negative_prompt
    sampler = _shared(weights, texts, material, bundle.settings, bundle.batch_size)
    return Subject(str(source), bundle.shown, sampler)


def _sampler(weights: UNetWeights, config: RunConfig, material: Material) -> Sampler:
    texts = material.source.prompts, config.prompts.negative_prompt
    settings = sampling_settings(config, material.train)
    return _shared(weights, texts, material, settings, config.sampling.batch_size)


def _shared(
    weights: UNetWeights,
    texts: tuple[Mapping[str, str], str],
    material: Material,
    settings: Settings,
    batch_size: int,
) -> Sampler:
    """A sampler on the UNet that is shared by everything evaluated here, and on the autoencoder where it is the same.

    Args:
        texts: class label -> prompt, and the negative prompt.
    """
    base, pipe = weights.base, material.pipe
    if isinstance(weights.tuned, FineTune):
        weights.tuned.check(base)
    if base.digest("vae") != material.base.digest("vae"):
        pipe = with_networks(base.pipeline(), vae=base.vae().to(material.device))
    elif base is not material.base:
        pipe = with_networks(base.pipeline(), vae=pipe.vae)
    conditioner = encode_prompts(base, *texts, embedding_cache(material.cache, base)).to(material.device)
    return Sampler(pipe, conditioner, settings, batch_size, partial(material.shared_unet.hold, weights))
