"""A bundle: everything that drawing needs, as safetensors and JSON in one folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dfu_mlflow.base.load import resolve_base
from dfu_mlflow.bundle_format import BUNDLE, Settings
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.documents import FORMAT, read_document


@dataclass(frozen=True)
class BundleSource:
    """Where a bundle's content comes from.

    Attributes:
        weights: safetensors file of what was trained (of a checkpoint: live or EMA).
        prompts: class label -> prompt.
        settings: sampling defaults.
        shown: `live` or `ema`.
        base_digests: part of the base -> SHA-256 of its weight files; what a base that is only referred to is held to.
    """

    weights: Path
    prompts: Mapping[str, str]
    settings: Settings
    shown: str
    base_digests: Mapping[str, str] = field(default_factory=dict)


def write_bundle(folder: Path, config: RunConfig, source: BundleSource) -> Path:
    """Write a bundle that `Sampler.load` opens. A base that is a local folder travels along; a hub id is referred to.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True)
    base = resolve_base(config.base_model)
    bundled = Path(base).is_dir()
    if bundled:
        shutil.copytree(base, folder / "base", ignore=shutil.ignore_patterns("*.md", "*.csv", "*.png"))
    shutil.copyfile(source.weights, folder / "weights.safetensors")
    facts = {
        "format": FORMAT,
        "base": {"bundled": bundled, "source": config.base_model, "file_digests": dict(source.base_digests)},
        "adapter": config.adapter.model_dump(mode="json"),
        "mixed_precision": config.train.mixed_precision,
        "shown": source.shown,
        "prompts": dict(source.prompts),
        "negative_prompt": config.prompts.negative_prompt,
        "settings": asdict(source.settings),
        "batch_size": config.sampling.batch_size,
    }
    (folder / BUNDLE).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    return folder


def copy_bundle(bundle: Path, folder: Path, settings: Settings) -> Path:
    """The same weights, base and prompts in another folder, with other sampling defaults."""
    shutil.copytree(bundle, folder)
    change_settings(folder, settings)
    return folder


def change_settings(folder: Path, settings: Settings) -> None:
    """Give a bundle other sampling defaults."""
    facts = read_document(folder / BUNDLE, "sampler") | {"settings": asdict(settings)}
    (folder / BUNDLE).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
