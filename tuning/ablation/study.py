"""What the `study` entry point does: a factorial in nested MLflow runs, then effects with intervals and words."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient

from dfu_mlflow.alone import alone
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import dump_yaml, merge, parse_flags, read_tree, validate
from dfu_mlflow.config.study import Plan, read_plan
from dfu_mlflow.errors import Interrupted, UserError
from dfu_mlflow.evaluator import Measurement
from dfu_mlflow.interrupt import StopRequest
from dfu_mlflow.phases import phase
from dfu_mlflow.pipeline import run_training
from dfu_mlflow.preparation import read_source
from dfu_mlflow.runtime import provenance, release_memory
from dfu_mlflow.tracking import REASON_TAG, masked
from dfu_mlflow.tracking_store import NAME_TAG, PARENT_TAG, experiment_id, prepare_store, set_tags
from dfu_mlflow.verdict import check_names, larger_is_better
from tuning.ablation.design import Cell
from tuning.ablation.effects import Effect, effects, verdict
from tuning.ablation.page import study_page
from tuning.ablation.runs import CellSupervisor, Experiment, Journal, lay_out
from tuning.space import common_settings

OUTPUT_DIR = "outputs/study"
LOCK = "study.lock"
MAX_FAILURES = 3
"""Trainings in a row without a figure after which a study stops: something else is wrong."""


def study(plan_name: str, config_name: str, flags: Sequence[str]) -> list[str]:
    """Train and sample what the plan asks for, and say what each factor does.

    Args:
        plan_name: a built-in plan or a YAML file.
        config_name: preset or file that every run starts from.
        flags: of the configuration, and of the plan under `--plan.`; they win.

    Returns:
        What the study says.

    Raises:
        UserError: for input that cannot be worked with.
        Interrupted: after Ctrl-C or SIGTERM; the same command goes on.
    """
    change = parse_flags(flags)
    plan = read_plan(plan_name, change.pop("plan", {}))
    name = Path(plan_name).stem
    tree = merge({"output_dir": f"{OUTPUT_DIR}/{name}"}, merge(read_tree(config_name), change))
    config = validate(RunConfig, merge(tree, {"registry": {"register_model": False}}))
    experiment = lay_out(plan, config)
    check_names(config.evaluation, read_source(config).split.classes)
    facts = {"plan": plan.model_dump(mode="json"), "config": common_settings(config)}
    busy = f"another process works on the study in {config.output_dir}: wait for it, or give another --output_dir"
    with StopRequest() as stop, alone(config.output_dir / LOCK, busy):
        journal = Journal(config.output_dir, facts)
        parent = open_parent(name, config, plan, journal)
        with closing(parent):
            work(experiment, journal, parent, stop.check)
            said, tables = conclusions(experiment, journal)
            page = study_page(name, experiment, journal, said, tables)
            publish_conclusions(parent, said, tables, page)
        client = MlflowClient()
        client.set_tag(parent, REASON_TAG, "finished")
        client.set_terminated(parent, "FINISHED")
    return said


@contextmanager
def closing(run_id: str) -> Iterator[None]:
    """No run stays RUNNING whatever ends the block; one that has ended keeps its status and its reason."""
    try:
        yield
    except BaseException as error:
        client = MlflowClient()
        if client.get_run(run_id).info.status == "RUNNING":
            by_hand = isinstance(error, Interrupted | KeyboardInterrupt)
            reason = "stopped; the same command goes on" if by_hand else f"{type(error).__name__}: {masked(error)}"
            client.set_tag(run_id, REASON_TAG, reason)
            client.set_terminated(run_id, "KILLED" if by_hand else "FAILED")
        raise


def publish_conclusions(parent: str, said: Sequence[str], tables: Mapping[str, tuple[Effect, ...]], page: str) -> None:
    """Words, page and effects to the study's run."""
    client = MlflowClient()
    client.log_text(parent, "\n".join(said) + "\n", "summary.txt")
    client.log_text(parent, page, "report.html")
    for headline, found in tables.items():
        for effect in found:
            client.log_metric(parent, f"effect/{headline}/{effect.name}", effect.estimate.value)


def open_parent(name: str, config: RunConfig, plan: Plan, journal: Journal) -> str:
    """The study's own run: the one it had, the one `mlflow run` made, or a new one."""
    prepare_store()
    client = MlflowClient()
    given = os.environ.pop("MLFLOW_RUN_ID", None)
    parent = journal.content["parent"]
    if parent is None:
        parent = given or str(client.create_run(experiment_id(config.tracking.experiment)).info.run_id)
        journal.content["parent"] = parent
        journal.save()
        set_tags(client, parent, {NAME_TAG: f"study {name}"} | provenance())
        client.log_text(parent, dump_yaml(plan), "plan.yaml")
        client.log_text(parent, dump_yaml(config), "config.yaml")
    elif given not in (None, parent):
        client.set_tag(given, PARENT_TAG, parent)
    client.update_run(parent, status="RUNNING")
    return str(parent)


def work(experiment: Experiment, journal: Journal, parent: str, check_stop: Callable[[], None]) -> None:
    """Train everything that is not measured yet.

    Args:
        experiment: the study.
        journal: what is measured so far.
        parent: the study's run.
        check_stop: called before each training and after the last; raises to stop.

    Raises:
        UserError: after `MAX_FAILURES` trainings in a row without a figure.
    """
    runs = experiment.runs()
    left = [(cell, seed) for cell, seed in runs if not journal.done(cell, seed)]
    baselines: dict[str, Measurement] = {}
    failed: list[tuple[Cell, int]] = []
    with phase("study", len(runs), "trainings") as progress:
        progress.begin_at(len(runs) - len(left))
        for cell, seed in left:
            check_stop()
            reason = train(experiment, journal, parent, (cell, seed), baselines)
            failed = [] if reason is None else [*failed, (cell, seed)]
            if len(failed) == MAX_FAILURES:
                journal.forget(failed)
                raise UserError(
                    f"{MAX_FAILURES} trainings in a row ended without a figure, the last one: {reason}; mend that, and "
                    "the same command tries them again"
                )
            progress.advance()
    check_stop()


def train(
    experiment: Experiment, journal: Journal, parent: str, run: tuple[Cell, int], baselines: dict[str, Measurement]
) -> str | None:
    """One training with its samplings; why it has no figure, None when it has."""
    cell, seed = run
    config = experiment.configuration(cell, seed)
    if (entry := journal.entry(cell, seed)) is None:
        tags = {PARENT_TAG: parent, NAME_TAG: config.output_dir.name}
        tags |= {f"factor.{name}": level for name, level in cell.items()} | {"factor.seed": str(seed)}
        client = MlflowClient()
        run_id = client.create_run(client.get_run(parent).info.experiment_id, tags=tags).info.run_id
        journal.begin(cell, seed, str(run_id))
    else:
        run_id = entry["run_id"]
    supervisor = CellSupervisor(experiment, cell, str(run_id), baselines)
    release_memory()  # of the training before
    try:
        with closing(str(run_id)):  # also where training ends before it has opened the run
            run_training(config, supervisor=supervisor)
    except UserError as error:
        reason = masked(error)
        journal.end(cell, seed, failed=reason)
        return reason
    journal.end(cell, seed, samplings=supervisor.samplings)
    shutil.rmtree(config.output_dir, ignore_errors=True)  # weights of every training would fill the disk
    return None


def conclusions(experiment: Experiment, journal: Journal) -> tuple[list[str], dict[str, tuple[Effect, ...]]]:
    """What the figures say, in words, and the effects on each headline."""
    factors = {factor.name: factor for factor in experiment.factors}
    said: list[str] = []
    tables: dict[str, tuple[Effect, ...]] = {}
    for headline in experiment.plan.headlines:
        found = effects(experiment.factors, journal.observations(headline))
        if not found:
            said.append(f"{headline}: not computed in any run")
            continue
        tables[headline] = found
        smaller = not larger_is_better(headline)
        said.append(f"{headline} ({'smaller' if smaller else 'larger'} is better; {found[0].runs} trainings):")
        single = [effect for effect in found if len(effect.factors) == 1]
        pairs = [effect for effect in found if len(effect.factors) == 2 and effect.found]
        said += [f"  {verdict(effect, factors, smaller)}" for effect in (*single, *pairs)]
    said += [
        f"no figure: {' '.join(f'{k}={v}' for k, v in entry['cell'].items())}, seed {entry['seed']}: {entry['failed']}"
        for entry in journal.failures()
    ]
    return said, tables
