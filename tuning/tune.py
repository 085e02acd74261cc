"""What the `tune` entry point does: join the study, work on it, and end it once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import Tree, dump_yaml, merge, parse_flags, preset_names, read_tree, validate
from dfu_mlflow.interrupt import StopRequest
from dfu_mlflow.participant import TrainingResult
from dfu_mlflow.preparation import read_source
from dfu_mlflow.runtime import provenance
from registry.publish import publish
from registry.source import locate
from tuning.charts import importances, pages
from tuning.objective import TrainingObjective
from tuning.outcome import Objective
from tuning.sampling_study import SamplingObjective
from tuning.space import check_space
from tuning.study import WORKER, Worker, join
from tuning.summary import best_trials, lines

ENDED = "ended"
"""Attribute of a study: when, by whom and at which number of trials it was ended."""
ENDING_S = 600.0
"""After this long another process may end a study whose ending was begun."""


def tune(config_name: str, flags: Sequence[str]) -> list[str]:
    """Work on a study until its budget is spent; the process that ran its last trial ends it.

    Args:
        config_name: preset or file.
        flags: of the configuration; they win.

    Returns:
        What the study says.

    Raises:
        UserError: for input that cannot be worked with.
        Interrupted: after Ctrl-C or SIGTERM; the same command goes on.
    """
    tree = merge(read_tree(config_name), parse_flags(flags))
    config = validate(RunConfig, tree)
    check_space(config)
    with StopRequest() as stop:
        if config.tune.kind == "training":
            read_source(config)
            return work(config, TrainingObjective(config), stop.check)
        config = sampling_configuration(config, tree, config_name, flags)
        return work(config, SamplingObjective(config, stop.check), stop.check)


def sampling_configuration(config: RunConfig, tree: Tree, config_name: str, flags: Sequence[str]) -> RunConfig:
    """What the source was trained with, under what the user stated; a preset states its `tune` section alone.

    Raises:
        UserError: for a source that is not there.
    """
    own = locate(config.tune.source).configuration
    if own is None:
        return config
    stated = merge({"tune": tree.get("tune", {})}, parse_flags(flags))
    if config_name not in preset_names():
        stated = merge(read_tree(config_name), stated)
    return validate(RunConfig, merge(merge(own, {"resume": "none"}), stated))


def work(config: RunConfig, objective: Objective, check_stop: Callable[[], None]) -> list[str]:
    """Take part in the study, and end it if that falls to this process."""
    worker = Worker(config, join(config, objective.names), objective)
    if worker.runs.is_fresh():
        worker.runs.describe(dump_yaml(config), provenance())
    worker.work(check_stop)
    said = lines(worker.study, objective.names)
    if not falls_to(worker):
        return said
    budget = config.tune.trials
    worker.study.set_user_attr(ENDED, {"by": worker.name, "at": time.time(), "trials": budget, "done": False})
    conclude(config, worker, objective.names, said)
    worker.study.set_user_attr(ENDED, {"by": worker.name, "at": time.time(), "trials": budget, "done": True})
    return said


def falls_to(worker: Worker) -> bool:
    """Does ending the study fall to this process?

    To the one that ran the trial that ended last; or, where that one is gone, to whoever comes after it.
    """
    ended = worker.study.user_attrs.get(ENDED)
    if ended is not None and ended["trials"] >= worker.config.tune.trials:
        return not ended["done"] and time.time() - ended["at"] > ENDING_S
    finished = worker.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    if not finished:
        return True
    last = max(finished, key=lambda trial: (trial.datetime_complete, trial.number))
    return last.user_attrs.get(WORKER) == worker.name or not worker.ran


def conclude(config: RunConfig, worker: Worker, names: tuple[str, ...], said: list[str]) -> None:
    """Charts, figures and words to the study's run; the best checkpoint to the registry; no run left open."""
    study, runs = worker.study, worker.runs
    runs.close_orphans(study)
    for name, page in pages(study, names).items():
        runs.client.log_text(runs.parent_id, page, f"charts/{name}")
    shares = {name: importances(study, number) for number, name in enumerate(names)}
    runs.client.log_text(runs.parent_id, json.dumps(shares, indent=1), "importances.json")
    runs.client.log_text(runs.parent_id, "\n".join(said) + "\n", "summary.txt")
    best = best_trials(study)
    for trial in best[:1]:
        runs.client.set_tag(runs.parent_id, "best.trial", str(trial.number))
        for number, name in enumerate(names):
            runs.client.log_metric(runs.parent_id, f"best/{name}", trial.values[number])
    if best and config.tune.kind == "training":
        register(config, best[0])
    runs.close("FINISHED" if best else "FAILED", "finished" if best else "no trial has a figure")


def register(config: RunConfig, trial: FrozenTrial) -> None:
    """Register the best trial's checkpoint, with the guidance it was judged at as its default."""
    facts = trial.user_attrs
    bundle = Path(facts["bundle"])
    if not bundle.is_dir():
        print(
            f"not registered: trial {trial.number} was run elsewhere ({facts[WORKER]}), and its files in {bundle} "
            "cannot be seen from here; let the processes share output_dir"
        )
        return
    publish(
        TrainingResult(
            run_id=facts["mlflow_run_id"],
            folder=bundle.parent,
            bundle=bundle,
            best_epoch=int(facts["best_epoch"]),
            shown=facts["shown"],
            figures=facts["figures"],
            verdict=facts["verdict"],
        ),
        config,
    )
