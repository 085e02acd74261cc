"""What the `diagnose` entry point does: gather what is at hand about a run, examine it, tell."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dfu_mlflow.base.load import resolve_base
from dfu_mlflow.checkpoint import CheckpointStore
from dfu_mlflow.conditioning import FED
from dfu_mlflow.config import RunConfig, flatten
from dfu_mlflow.config.load import Tree, merge, parse_flags, validate
from dfu_mlflow.diagnosis.bench import Bench, Shown
from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.checks.resolution_off_native import native_px
from dfu_mlflow.diagnosis.diagnose import Diagnosis, diagnose
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.diagnosis.report import BUDGET_TAG, diagnosis_report, diagnosis_section, finding_tags, findings_file
from dfu_mlflow.diagnosis.weights import WeightFiles, checkpoint_updates, find_weights
from dfu_mlflow.errors import ConfigError, UserError
from dfu_mlflow.report.render import render, render_section, with_section
from dfu_mlflow.subject import CHECKPOINTS
from dfu_mlflow.tracking import IMAGE_FILE, masked
from dfu_mlflow.tracking_store import set_tags
from registry.source import read_text
from registry.told import DiagnoseOptions, Told, tell_of_checkpoint, tell_of_run

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
        "prompts": (
            ("prompts.style", "prompts.phase_prompts"),
            "its captions are not known (--prompts.phase_prompts '{LABEL: PROMPT}', or --prompts.style)",
        ),
        "sampling": (
            ("sampling.guidance_scale",),
            "how it is sampled is not known (--sampling.guidance_scale, or pictures: --images FOLDER)",
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


def run_diagnosis(
    options: DiagnoseOptions, config_name: str | None, flags: Sequence[str]
) -> tuple[Diagnosis, list[Path]]:
    """Gather, examine, and write `findings.json` and `report.html`; tag the run if it is one of ours.

    Returns:
        The diagnosis and the files it was written to.

    Raises:
        UserError: for input that cannot be worked with.
    """
    if options.run and (config_name or options.curves):
        raise UserError(f"--{'config' if config_name else 'curves'} goes with --checkpoint: a run tells its own")
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
    folder = output_dir / (options.run.removeprefix("runs:/")[:8] or _folder_name(options.checkpoint or Path()))
    return diagnosis, _write(case.name, diagnosis, options, folder)


def _folder_name(checkpoint: Path) -> str:
    """Its name, and enough to tell it from others of that name."""
    place = checkpoint.expanduser().resolve()
    return f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:6]}"


def build_case(options: DiagnoseOptions, told: Told, stated: Tree) -> Case:
    """What the user typed wins over what the source says."""
    options_of_ours = {"output_dir": str(OUTPUT_DIR), "resume": "none"}
    tree = merge(merge(told.configuration or {}, stated), options_of_ours)
    unnamed: dict[str, str] = {}
    if told.foreign:
        unnamed = {
            part: words for part, (keys, words) in UNNAMED.items() if not any(_states(tree, key) for key in keys)
        }
        unnamed["cache"] = NO_CACHE
    try:
        resolve_base(validate(RunConfig, tree).base_model)
    except UserError as error:
        if isinstance(error, ConfigError) or _states(stated, "base_model"):
            raise
        unnamed.setdefault("base", f"the base is not on this machine ({error}): give --base_model")
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
        try:
            place = findings_file(diagnosis.budget, client.get_run(run_id).data.tags.get(BUDGET_TAG))
            client.log_text(run_id, findings, place)
            if place == FINDINGS:
                report = read_text(run_id, REPORT)
                client.log_text(run_id, html if report is None else with_section(report, section), REPORT)
                set_tags(client, run_id, finding_tags(diagnosis))
        except (MlflowException, OSError) as error:  # an hour of probes is not to be lost with it
            print(f"note: not written to MLflow, only to {folder}: {masked(error)}")
    return [folder / file for file in written]
