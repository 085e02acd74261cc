"""What the `diagnose` entry point does: gather what is at hand about a run, examine it, tell."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dfu_mlflow.base.load import resolve_base
from dfu_mlflow.checkpoint import CheckpointStore
from dfu_mlflow.conditioning import FED
from dfu_mlflow.config import RunConfig, flatten, preset_names
from dfu_mlflow.config.load import Tree, merge, parse_flags, read_tree, validate
from dfu_mlflow.config.section import Section
from dfu_mlflow.diagnosis.bench import Bench, Shown
from dfu_mlflow.diagnosis.case import Case, Life
from dfu_mlflow.diagnosis.checks.resolution_off_native import native_px
from dfu_mlflow.diagnosis.diagnose import Budget, Diagnosis, diagnose
from dfu_mlflow.diagnosis.foreign import read_foreign
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.diagnosis.report import BUDGET_TAG, diagnosis_report, diagnosis_section, finding_tags, findings_file
from dfu_mlflow.diagnosis.weights import WeightFiles, checkpoint_updates, find_weights
from dfu_mlflow.errors import UserError
from dfu_mlflow.report.render import render, render_section, with_section
from dfu_mlflow.subject import CHECKPOINTS, local_configuration
from dfu_mlflow.tracking import HEARTBEAT_TAG, IMAGE_FILE
from dfu_mlflow.tracking_store import logged_points, set_tags
from registry.source import RUN_ID, read_text, run_configuration

OUTPUT_DIR = Path("outputs/diagnose")
FINDINGS = "findings.json"
REPORT = "report.html"
UNNAMED: Mapping[str, tuple[tuple[str, ...], str]] = MappingProxyType(
    {
        "base": (("base_model",), "the base was not named (--base_model)"),
        "photographs": (
            ("data.root", "data.manifest"),
            "no photographs were named (--data.root or --data.manifest)",
        ),
    }
)
"""What a fine-tune made elsewhere must say: its settings, and what is missing where it does not."""
SPLIT_KEYS = ("data.validation_fraction", "seed")
"""Settings that, with the photographs, make this project's split again; its manifests have no column of sides."""
NO_SPLIT = (
    "the run's own split is not known: where this project made it, state --data.validation_fraction and --seed; else "
    "compare the patients on its two sides yourself"
)
NO_CACHE = "the run's own cache of latents is not known: one that this project fills now is never stale"
BUDGET_FILE = "budget.txt"
"""Beside the findings in a folder: `cheap` or `full`."""


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


def run_diagnosis(
    options: DiagnoseOptions, config_name: str | None, flags: Sequence[str]
) -> tuple[Diagnosis, list[Path]]:
    """Gather, examine, and write `findings.json` and `report.html`; tag the run if it is one of ours.

    Returns:
        The diagnosis and the files it was written to.

    Raises:
        UserError: for input that cannot be worked with.
    """
    if bool(options.run) == (options.checkpoint is not None):
        raise UserError(
            "give one of --run ID (an MLflow run) and --checkpoint PATH (with --base_model, --data.root ...)"
        )
    told = tell_of_run(options.run) if options.run else tell_of_checkpoint(options, config_name)
    for note in told.notes:
        print(f"note: {note}")
    stated = parse_flags(flags)
    output_dir = Path(stated.pop("output_dir", OUTPUT_DIR))
    case = build_case(options, told, stated)
    diagnosis = diagnose(case, options.budget)
    folder = output_dir / (options.run.removeprefix("runs:/")[:8] or Path(case.name).name)
    return diagnosis, _write(case.name, diagnosis, options, folder)


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
    settings = flatten(validate(RunConfig, configuration)) if configuration else {}
    place: Path | str = "the run has no configuration, so its folder is not known"
    if configuration:
        place = Path(configuration["output_dir"]) / match[1][:8]
    return Told(configuration, settings, curves, tags, life, place, lacking, foreign=not configuration)


def tell_of_checkpoint(options: DiagnoseOptions, config_name: str | None) -> Told:
    """A folder or file: this project's own tells its configuration and history, a foreign one what `--config` says."""
    assert options.checkpoint is not None
    place = options.checkpoint.expanduser()
    if not place.exists():
        raise UserError(f"--checkpoint {place}: no such file or folder")
    curves, lacking = _curves(options, place)
    own = local_configuration(place) if place.is_dir() else None
    foreign_run = own is None
    notes: tuple[str, ...] = ()
    if own is not None:
        settings = flatten(validate(RunConfig, own))
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
    return Told(own, settings, curves, _history_tags(place), None, place, lacking, notes, foreign_run)


def build_case(options: DiagnoseOptions, told: Told, stated: Tree) -> Case:
    """What the user typed wins over what the source says."""
    options_of_ours = {"output_dir": str(OUTPUT_DIR), "resume": "none"}
    tree = merge(merge(told.configuration or {}, stated), options_of_ours)
    unnamed = {part: words for part, (keys, words) in UNNAMED.items() if not any(_states(tree, key) for key in keys)}
    unnamed = {**unnamed, "cache": NO_CACHE} if told.foreign else {}
    if told.foreign and not all(_states(tree, key) for key in SPLIT_KEYS):
        unnamed["split"] = NO_SPLIT
    if told.foreign and "base" not in unnamed and not _states(tree, "data.resolution_px"):
        try:  # what the base is made for, where nothing says what the run used
            tree = merge(tree, {"data": {"resolution_px": native_px(tree["base_model"])}})
        except Lacking as reason:
            unnamed["resolution"] = f"{reason}: give --data.resolution_px"
    config = validate(RunConfig, tree)
    typed = {key: value for key, value in flatten(config).items() if _states(stated, key)}
    settings = {**told.settings, **typed}
    lacking = dict(told.lacking)
    bench: Bench | None = None
    if options.budget == "cheap":
        lacking["bench"] = "the model is not loaded with --budget cheap"
    else:
        bench = _bench(options, told, config, unnamed)
    name = options.run or str(options.checkpoint)
    return Case(name, settings, told.curves, told.tags, told.life, bench, lacking)


def _bench(options: DiagnoseOptions, told: Told, config: RunConfig, unnamed: Mapping[str, str]) -> Bench:
    alpha = config.adapter.alpha
    folder = told.folder
    shown: Shown = "live"
    updates: int | None = None
    files: WeightFiles | str
    embeddings = options.embeddings
    try:
        if isinstance(folder, str):
            raise Lacking(folder)
        embeddings = embeddings or _recorded(folder)
        folder, shown = _checkpoint_in(folder)
        updates = checkpoint_updates(folder)
        files = find_weights(folder, alpha)
    except Lacking as reason:
        files = str(reason)
    if options.weights != "best":
        shown = "live" if options.weights == "live" else "ema"
    elif isinstance(files, WeightFiles) and files.ema is not None and updates is None:
        shown = "ema"  # foreign trainers sample from the average where they keep one
    resolve_base(config.base_model)
    return Bench(config, files, shown, options.images, embeddings, updates, unnamed)


def _recorded(folder: Path) -> Path | None:
    """The text embeddings that a run of this project trained on, from its folder or one of its checkpoints."""
    places = (folder / FED, folder.parent.parent / FED)
    return next((place for place in places if place.is_file()), None)


def _checkpoint_in(folder: Path) -> tuple[Path, Shown]:
    """A run's newest checkpoint and the weights it judged better; any other path as it is."""
    if not folder.exists():
        raise Lacking(f"the run's folder {folder} is not on this machine: give --checkpoint, or diagnose there")
    if not (folder / CHECKPOINTS).is_dir():
        return folder, "live"
    store = CheckpointStore(folder / CHECKPOINTS, keep_last=1)
    complete, best = store.complete(), store.best()
    if not complete:
        raise Lacking(f"{folder} holds no whole checkpoint")
    return complete[-1], "ema" if best and best["shown"] == "ema" else "live"


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
    return {"best.weights": str(best["shown"])} if best else {}


def _states(stated: Mapping[str, Any], key: str) -> bool:
    node: Any = stated
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def _write(name: str, diagnosis: Diagnosis, options: DiagnoseOptions, folder: Path) -> list[Path]:
    """Into a folder, and for a run of ours into its artifacts, a section of its report and tags as well; full findings
    are never replaced by cheap ones."""
    folder.mkdir(parents=True, exist_ok=True)
    # Errors name image files, and these name patients.
    html, section, findings = (
        IMAGE_FILE.sub("[image]", text)
        for text in (
            render(diagnosis_report(name, diagnosis)),
            render_section(diagnosis_section(diagnosis)),
            diagnosis.document(),
        )
    )
    budget = folder / BUDGET_FILE
    before = budget.read_text(encoding="utf-8").strip() if budget.is_file() else None
    place = findings_file(diagnosis.budget, before)
    written = {place: findings, **({REPORT: html} if place == FINDINGS else {})}
    for file, text in written.items():
        (folder / file).write_text(text, encoding="utf-8")
    if place == FINDINGS:
        budget.write_text(f"{diagnosis.budget}\n", encoding="utf-8")
    if options.run:
        client, run_id = MlflowClient(), options.run.removeprefix("runs:/")
        place = findings_file(diagnosis.budget, client.get_run(run_id).data.tags.get(BUDGET_TAG))
        client.log_text(run_id, findings, place)
        if place == FINDINGS:
            report = read_text(run_id, REPORT)
            client.log_text(run_id, html if report is None else with_section(report, section), REPORT)
            set_tags(client, run_id, finding_tags(diagnosis))
    return [folder / file for file in written]
