"""Is a checkpoint one of this configuration? A run goes on only as what it was started as."""

from __future__ import annotations

from typing import Any

from dfu_mlflow.checkpoint import Checkpoint
from dfu_mlflow.config.load import flatten
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.errors import UserError

FREE = (
    "resume",
    "output_dir",
    "device",
    "data.cache_dir",
    "data.root",
    "data.manifest",
    "data.bounding_boxes",
    "ema.on_host",
    "train.fused_backward",
    "train.compile",
)
FREE_SECTIONS = ("checkpoint.", "tracking.", "registry.", "runtime.", "tune.")
"""What may differ: places, and what touches neither weights nor figures, rounding apart."""


def check_same_run(checkpoint: Checkpoint, config: RunConfig, data_digest: str) -> None:
    """Refuse a checkpoint of another configuration or of other photographs.

    More `train.epochs` than before are allowed under a constant schedule, where they change nothing that came before.

    Raises:
        UserError: naming every setting that differs.
    """
    before = flatten(RunConfig.model_validate(checkpoint.state["config"]))
    now = flatten(config)
    free = {"train.epochs"} if config.train.lr_schedule == "constant" else set()
    differing = [
        f"--{name} was {_shown(before[name])}, is {_shown(now[name])}"
        for name in now
        if before.get(name) != now[name]
        and name not in FREE
        and name not in free
        and not name.startswith(FREE_SECTIONS)
    ]
    if differing:
        longer = "; a schedule that ends is not prolonged: train anew, or with --train.lr_schedule constant"
        told = longer if any(each.startswith("--train.epochs ") for each in differing) else ""
        raise UserError(f"the checkpoint is of another configuration: {'; '.join(differing)}{told}")
    if checkpoint.state["data"] != data_digest:
        raise UserError("the checkpoint is of other photographs or another split: give the data it was started with")


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)
