"""Configurations of other trainers -> settings under this project's names, as far as they are understood."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from dfu_mlflow.config import RunConfig, flatten
from dfu_mlflow.config.load import Tree, merge, validate
from dfu_mlflow.errors import ConfigError, UserError

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "pretrained_model_name_or_path": "base_model",
        "base_model": "base_model",
        "seed": "seed",
        "train_data_dir": "data.root",
        "instance_data_dir": "data.root",
        "resolution": "data.resolution_px",
        "image_size": "data.resolution_px",
        "random_flip": "data.horizontal_flip",
        "rank": "adapter.rank",
        "network_dim": "adapter.rank",
        "lora_rank": "adapter.rank",
        "lora_alpha": "adapter.alpha",
        "network_alpha": "adapter.alpha",
        "num_train_epochs": "train.epochs",
        "max_train_epochs": "train.epochs",
        "num_epochs": "train.epochs",
        "epochs": "train.epochs",
        "max_train_steps": "train.total_steps",
        "total_steps": "train.total_steps",
        "train_batch_size": "train.batch_size",
        "batch_size": "train.batch_size",
        "gradient_accumulation_steps": "train.gradient_accumulation_steps",
        "learning_rate": "train.learning_rate",
        "lr": "train.learning_rate",
        "unet_lr": "train.learning_rate",
        "lr_scheduler": "train.lr_schedule",
        "lr_warmup_steps": "train.warmup_steps",
        "warmup_steps": "train.warmup_steps",
        "max_grad_norm": "train.max_grad_norm",
        "mixed_precision": "train.mixed_precision",
        "gradient_checkpointing": "train.gradient_checkpointing",
        "use_ema": "ema.enabled",
        "ema_decay": "ema.decay",
        "ema_max_decay": "ema.decay",
        "ema_dtype": "ema.dtype",
        "guidance_scale": "sampling.guidance_scale",
        "cfg_scale": "sampling.guidance_scale",
        "num_inference_steps": "sampling.num_inference_steps",
        "sample_steps": "sampling.num_inference_steps",
        "phase_prompts": "prompts.phase_prompts",
        "negative_prompt": "prompts.negative_prompt",
        "proportion_empty_prompts": "prompts.dropout",
        "caption_dropout_rate": "prompts.dropout",
        "snr_gamma": "loss.min_snr_gamma",
        "min_snr_gamma": "loss.min_snr_gamma",
        "noise_offset": "loss.noise_offset",
        "prediction_type": "loss.prediction_type",
        "perceptual_weight": "loss.perceptual_loss.weight",
        "use_perceptual_loss": "loss.perceptual_loss.enabled",
        "num_eval_samples": "evaluation.samples",
        "fid_samples": "evaluation.samples",
        "best_metric": "evaluation.best_metric",
        "num_processes": "runtime.num_processes",
        "seed_by_rank": "runtime.seed_by_rank",
        "device_specific_seed": "runtime.seed_by_rank",
    }
)
"""Last part of a key as diffusers' scripts, kohya's sd-scripts, peft and the founding effort spell it -> ours."""
SCHEDULES: Mapping[str, str] = MappingProxyType({"constant_with_warmup": "constant", "polynomial": "linear"})
PER_PROCESS = "train_batch_size"
"""In diffusers' and kohya's scripts the samples of one process; `train.batch_size` counts those of all."""
OURS_ALONE = ("train.total_steps", "ema.dtype", "runtime.", "loss.perceptual_loss.no_grad")
"""Settings that checks read and a run of this project cannot have."""


@dataclass(frozen=True)
class ForeignConfig:
    """What a foreign configuration says.

    Attributes:
        settings: dotted key -> value, only what it states.
        tree: the same, for what the schema knows.
        unknown: keys that were not understood.
        notes: what was assumed, for the user.
    """

    settings: Mapping[str, Any]
    tree: Tree
    unknown: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_foreign(path: Path) -> ForeignConfig:
    """Read YAML, JSON or TOML, nested or flat; this project's own dotted names are understood as well.

    Raises:
        UserError: for a file that cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        read = {".json": json.loads, ".toml": tomllib.loads}.get(path.suffix, yaml.safe_load)
        content = read(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"--config {path} must hold settings, not a {type(content).__name__}")
    return understood(content)


def understood(content: Mapping[str, Any]) -> ForeignConfig:
    """What of a configuration of any trainer can be taken over."""
    settings: dict[str, Any] = {}
    unknown, notes = [], []
    per_process = False
    for key, value in _leaves(content):
        word = key.rsplit(".", 1)[-1].replace("-", "_").lower()
        name = key if _known(key, value) else NAMES.get(word)
        value = SCHEDULES.get(value, value) if name == "train.lr_schedule" and isinstance(value, str) else value
        if name is None or not _known(name, value):
            unknown.append(key)
        elif value is not None:
            settings[name] = value
            per_process = word == PER_PROCESS if name == "train.batch_size" else per_process
    if per_process:
        notes = _all_processes(settings)
    if "adapter.rank" in settings:
        settings.setdefault("adapter.method", "lora")
    inside = {name: value for name, value in settings.items() if not name.startswith(OURS_ALONE)}
    tree: Tree = {}
    for name, value in inside.items():
        tree = merge(tree, _nested(name, value))
    typed = flatten(validate(RunConfig, tree))  # YAML reads 1e-4 as text
    return ForeignConfig({**settings, **{name: typed[name] for name in inside}}, tree, tuple(unknown), tuple(notes))


def _all_processes(settings: dict[str, Any]) -> list[str]:
    """Count the batch of one process for all of them; what to say where nothing tells how many there were."""
    processes = settings.get("runtime.num_processes")
    if not isinstance(processes, int):
        return [f"{PER_PROCESS} is counted for one process: state num_processes where there were more"]
    settings["train.batch_size"] = processes * int(settings["train.batch_size"])
    return []


def _known(name: str, value: Any) -> bool:
    """Does the schema (or a check) know this setting with such a value?"""
    if name.startswith(OURS_ALONE):
        return True
    try:
        validate(RunConfig, _nested(name, value))
    except ConfigError as error:
        # Right by itself, though it needs another setting beside it.
        return not any(problem.startswith("--") for problem in error.problems)
    return True


def _nested(name: str, value: Any) -> Tree:
    tree: Any = value
    for part in reversed(name.split(".")):
        tree = {part: tree}
    return dict(tree)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and key != "phase_prompts":
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
