"""What `diagnose --runs` does: runs of MLflow -> what the failing ones share, and plans that separate it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from dfu_mlflow.config import RunConfig, flatten
from dfu_mlflow.config.load import dump_yaml, validate
from dfu_mlflow.config.section import Section
from dfu_mlflow.config.study import Plan
from dfu_mlflow.diagnosis.shared_causes import Attempt, Comparison, shared_causes
from dfu_mlflow.diagnosis.shared_report import comparison_report
from dfu_mlflow.errors import ConfigError, UserError
from dfu_mlflow.report.render import render
from dfu_mlflow.verdict import larger_is_better
from registry.source import RUN_ID, run_configuration

MADE_BY_TRAIN = "cfg/train.epochs"
EVALUATED = "evaluated"
"""Parameters that tell a training from an evaluation of one."""
FINDING_TAG = re.compile(r"finding\.(?!first$)(.+)")
MOST_RUNS = 1000


class CompareOptions(Section):
    """What `diagnose --runs` takes."""

    runs: str
    """Ids with commas between them; or a filter of MLflow (`params.adapter.method = 'lora'`), `all` for every run."""
    experiment: str = ""
    """Where a filter looks; nothing means every experiment."""
    outcome: str = "kid_progress"
    """Figure of `eval/` by its name, of the weights that the run judged better."""
    failing: float = 0.25
    """A run fails that ended without the figure, or with one worse than this."""
    output_dir: Path = Path("outputs/diagnose/runs")


def compare_runs(options: CompareOptions) -> tuple[Comparison, list[Path]]:
    """Compare, and write `shared_causes.json`, `report.html`, and for what is confounded plans of a `study`.

    Returns:
        What was found, and the files.

    Raises:
        UserError: for runs that are not there, or cannot be compared.
    """
    found = find_runs(options)
    trained, notes = trainings(found)
    attempts = {run.info.run_id: attempt(run, config, options) for run, config in trained}
    if attempts and all(each.value is None for each in attempts.values()):
        raise UserError(f"--outcome {options.outcome}: none of {len(attempts)} runs has it: known are {_known(found)}")
    comparison = shared_causes(list(attempts.values()))
    comparison = replace(comparison, notes=(*comparison.notes, *notes))
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    written = {"shared_causes.json": comparison.document(), "report.html": render(comparison_report(comparison))}
    best = next(run for run in attempts if attempts[run] is comparison.attempts[0])
    plans = [cause.plan() for cause in comparison.causes if cause.confounded and not cause.fixed]
    if plans:
        config = next(config for run, config in trained if run.info.run_id == best)
        written["best_run.yaml"] = dump_yaml(config.model_copy(update={"output_dir": Path("outputs/separate")}))
    for position, plan in enumerate(plans, start=1):
        validate(Plan, plan)
        written[f"separate_{position}.yaml"] = yaml.safe_dump(plan, sort_keys=False, allow_unicode=True, width=100)
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    return comparison, [folder / name for name in written]


def find_runs(options: CompareOptions) -> list[Run]:
    """The runs, as MLflow holds them.

    Raises:
        UserError: for an id, a filter or an experiment that MLflow does not take.
    """
    client = MlflowClient()
    words = [word for word in re.split(r"[,\s]+", options.runs) if word]
    try:
        if words and all(RUN_ID.fullmatch(word) for word in words):
            ids = dict.fromkeys(word.removeprefix("runs:/") for word in words)
            return [client.get_run(run_id) for run_id in ids]
        experiments = list(client.search_experiments())
        if options.experiment:
            experiments = [each for each in experiments if options.experiment in (each.name, each.experiment_id)]
            if not experiments:
                raise UserError(f"--experiment {options.experiment}: no such experiment")
        wanted = "" if options.runs == "all" else options.runs
        return list(client.search_runs([each.experiment_id for each in experiments], wanted, max_results=MOST_RUNS))
    except MlflowException as error:
        raise UserError(f"--runs {options.runs} cannot be had: {str(error).splitlines()[0]}") from None


def trainings(runs: Sequence[Run]) -> tuple[list[tuple[Run, RunConfig]], list[str]]:
    """Runs of `train` (and of trials) that have ended, with their configurations; and what was left out, in words.

    An evaluation repeats the settings and figures of the run it speaks of, and the run of a whole study has no figure.
    """
    kept: list[tuple[Run, RunConfig]] = []
    unknown = running = 0
    for run in runs:
        if MADE_BY_TRAIN not in run.data.params or EVALUATED in run.data.params:
            continue
        if run.info.status == "RUNNING":
            running += 1
            continue
        try:
            kept.append((run, validate(RunConfig, run_configuration(run.info.run_id) or {"no": "configuration"})))
        except ConfigError:
            unknown += 1
    notes = [f"{running} runs are still RUNNING and left out"] if running else []
    if unknown:
        notes.append(f"{unknown} runs hold no configuration of this version and are left out")
    return kept, notes


def attempt(run: Run, config: RunConfig, options: CompareOptions) -> Attempt:
    """A run as the comparison takes it, at its best epoch; outcomes are turned so that larger is better."""
    sign = 1.0 if larger_is_better(options.outcome) else -1.0
    group = "eval_ema" if run.data.tags.get("best.weights") == "ema" else "eval"
    name = f"{group}/{options.outcome}"
    points = {point.step: point.value for point in MlflowClient().get_metric_history(run.info.run_id, name)}
    best = int(run.data.tags.get("best.epoch", -1))
    figure = points.get(best, points[max(points)] if points else None)
    value = None if figure is None or run.info.status == "FAILED" else sign * figure
    findings = {match[1]: text for tag, text in run.data.tags.items() if (match := FINDING_TAG.fullmatch(tag))}
    fails = value is None or value < sign * options.failing
    return Attempt(f"{run.info.run_name} ({run.info.run_id[:8]})", flatten(config), findings, value, fails)


def _known(runs: Sequence[Run]) -> str:
    names = {name.partition("/")[2] for run in runs for name in run.data.metrics if name.startswith("eval/")}
    return ", ".join(sorted(name for name in names if not name.endswith(("_low", "_high")))[:30]) or "none"
