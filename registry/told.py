"""What a run, or a fine-tune made elsewhere, tells about itself: configuration, curves, tags, weights."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dfu_mlflow.checkpoint import CheckpointStore
from dfu_mlflow.config import RunConfig, flatten, preset_names
from dfu_mlflow.config.load import Tree, known_part, merge, read_tree, validate
from dfu_mlflow.config.section import Section
from dfu_mlflow.diagnosis.case import BEST_WEIGHTS_TAG, Life
from dfu_mlflow.diagnosis.diagnose import Budget
from dfu_mlflow.diagnosis.foreign import read_foreign
from dfu_mlflow.errors import ConfigError, UserError
from dfu_mlflow.subject import CHECKPOINTS, local_configuration
from dfu_mlflow.tracking import HEARTBEAT_TAG
from dfu_mlflow.tracking_store import logged_points
from registry.source import RUN_ID, run_configuration

SCHEDULER = Path("scheduler", "scheduler_config.json")


class DiagnoseOptions(Section):
    """What the `diagnose` entry point takes beside the configuration."""

    run: str = ""
    """Id of an MLflow run of this project."""
    checkpoint: Path | None = None
    """A fine-tune made elsewhere (diffusers folder, LoRA file) or a checkpoint or run folder of this project."""
    images: Path | None = None
    """Folder with a sub-folder of generated pictures for each class."""
    embeddings: Path | None = None
    """Safetensors with the text embeddings trained on: embeddings, pooled, empty_embeddings, empty_pooled; rows by
    class. A run of this project keeps its own."""
    curves: Path | None = None
    """JSON of metric name -> {step: value}, what a foreign run logged."""
    weights: Literal["best", "live", "ema"] = "best"
    """Which weights the samples came from."""
    budget: Budget = "full"
    """`cheap` reads configuration and curves; `full` loads the model too."""


@dataclass(frozen=True)
class Told:
    """What a source says about itself.

    Attributes:
        configuration: the run's own, None where it has none.
        settings: dotted key -> value that it states.
        curves, tags, life: see `Case`.
        folder: where its weights are, or why they are not at hand.
        lacking: see `Case`.
        notes: for the user.
        foreign: no whole configuration of this project tells of it, and the defaults say nothing about it.
    """

    configuration: Tree | None
    settings: Mapping[str, Any]
    curves: Mapping[str, Mapping[int, float]]
    tags: Mapping[str, str]
    life: Life | None
    folder: Path | str
    lacking: Mapping[str, str]
    notes: tuple[str, ...] = ()
    foreign: bool = False


def tell_of_run(run: str) -> Told:
    """An MLflow run: configuration, curves, tags, status, and its folder of checkpoints if it is on this machine.

    Raises:
        UserError: for a run that is not in the tracking store.
    """
    match = RUN_ID.fullmatch(run)
    if match is None:
        raise UserError(f"--run {run} is no run's id: give the 32 digits that MLflow shows, or --checkpoint FOLDER")
    client = MlflowClient()
    try:
        found = client.get_run(match[1])
    except MlflowException as error:
        raise UserError(f"--run {run} cannot be had: {str(error).splitlines()[0]}") from None
    points = logged_points(client, match[1])
    curves = {name: {step: value for step, (_, value) in steps.items()} for name, steps in points.items()}
    configuration = run_configuration(match[1])
    lacking = {} if configuration else {"config": "the run holds no config.yaml: it ended before it began"}
    tags = {**found.data.tags, **{f"param.{key}": value for key, value in found.data.params.items()}}
    beat = float(tags.get(HEARTBEAT_TAG, found.info.start_time / 1000))
    life = Life(str(found.info.status), max(0.0, time.time() - beat))
    settings: Mapping[str, Any] = {}
    notes: tuple[str, ...] = ()
    if configuration:
        configuration, settings, notes = _own_configuration(configuration)
    place: Path | str = "the run has no configuration, so its folder is not known"
    if configuration:
        place = Path(str(configuration.get("output_dir", RunConfig().output_dir))) / match[1][:8]
    return Told(configuration, settings, curves, tags, life, place, lacking, notes, foreign=not configuration)


def tell_of_checkpoint(options: DiagnoseOptions, config_name: str | None) -> Told:
    """A folder or file: this project's own tells its configuration and history, a foreign one what `--config` says."""
    assert options.checkpoint is not None
    place = options.checkpoint.expanduser()
    if not place.exists():
        raise UserError(f"--checkpoint {place}: no such file or folder")
    curves, lacking = _curves(options, place)
    own = local_configuration(place) if place.is_dir() else None
    told = config_name or options.curves or options.images
    if own is None and not told and place.is_dir() and not any(place.rglob("*.safetensors")):
        runs = sorted(found.parent.name for found in place.glob("*/checkpoints"))
        below = f"; of the runs in it give one, e.g. {place / runs[-1]}" if runs else ""
        raise UserError(f"--checkpoint {place} holds no weights (*.safetensors){below}")
    foreign_run = own is None
    notes: tuple[str, ...] = ()
    if own is not None:
        own, settings, notes = _own_configuration(own)
    elif config_name is None:
        settings, lacking = {}, {**lacking, "config": "no configuration was given (--config FILE)"}
    elif config_name in preset_names():
        own = read_tree(config_name)
        settings = flatten(validate(RunConfig, own))
    else:
        foreign = read_foreign(Path(config_name))
        own, settings = foreign.tree, dict(foreign.settings)
        notes = foreign.notes
        if foreign.unknown:
            notes += (f"settings of {config_name} that were not understood: {', '.join(foreign.unknown)}",)
    predicts = _predicts(place)
    if foreign_run and predicts and "loss.prediction_type" not in settings:
        own, settings = merge(own or {}, {"loss": {"prediction_type": predicts}}), dict(settings)
        settings["loss.prediction_type"] = predicts
        notes += (f"its scheduler says that it predicts {predicts}",)
    return Told(own, settings, curves, _history_tags(place), None, place, lacking, notes, foreign_run)


def _own_configuration(tree: Tree) -> tuple[Tree, Mapping[str, Any], tuple[str, ...]]:
    """A configuration of this project, its settings, and a note where another version wrote it."""
    try:
        known, strange = known_part(RunConfig, tree)
    except ConfigError as error:
        raise UserError(
            f"another version wrote the run's configuration, and this one refuses it: {error}; diagnose it with that "
            "version, or give --checkpoint and a --config of its own"
        ) from None
    left = f"another version wrote its configuration; left out of it: {', '.join(strange)}"
    return known, flatten(validate(RunConfig, known)), (left,) if strange else ()


def _predicts(place: Path) -> str | None:
    """What the scheduler of a pipeline's folder says that its UNet predicts."""
    folder = next((each for each in (place, place.parent) if (each / SCHEDULER).is_file()), None)
    try:
        told = json.loads((folder / SCHEDULER).read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return None
    predicts = told.get("prediction_type") if isinstance(told, Mapping) else None
    return predicts if predicts in ("epsilon", "v_prediction") else None


def _curves(options: DiagnoseOptions, place: Path) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """Of `--curves`, else of the history that a run of this project keeps."""
    if options.curves is not None:
        try:
            content = json.loads(options.curves.read_text(encoding="utf-8"))
            told = {
                str(name): {int(step): float(value) for step, value in points.items()}
                for name, points in content.items()
            }
            return told, {}
        except (OSError, ValueError, AttributeError, TypeError):
            raise UserError(f"--curves {options.curves} is no JSON of metric name -> {{step: value}}") from None
    for folder in (place, place.parent.parent):
        if (folder / "history.json").is_file():
            epochs = json.loads((folder / "history.json").read_text(encoding="utf-8"))
            curves: dict[str, dict[int, float]] = {}
            for epoch, entry in epochs.items():
                for name, value in entry["figures"].items():
                    curves.setdefault(name, {})[int(epoch)] = float(value)
            return curves, {}
    return {}, {"curves": "no curves are at hand (--curves FILE, a JSON of metric name -> {step: value})"}


def _history_tags(place: Path) -> dict[str, str]:
    if not (place / CHECKPOINTS).is_dir():
        return {}
    best = CheckpointStore(place / CHECKPOINTS, keep_last=1).best()
    return {BEST_WEIGHTS_TAG: str(best["shown"])} if best else {}
