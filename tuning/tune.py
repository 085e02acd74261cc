"""What the `tune` entry point does: join the study, work on it, and end it once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import Tree, dump_yaml, merge, parse_flags, preset_names, read_tree, validate
from dfu_mlflow.interrupt import StopRequest
from dfu_mlflow.participant import TrainingResult
from dfu_mlflow.preparation import read_source
from dfu_mlflow.runtime import provenance
from dfu_mlflow.tracking_store import set_tags
from dfu_mlflow.verdict import check_names
from registry.aliases import GATE_TAG
from registry.promote import PromoteOptions, promote, registered_version
from registry.publish import publish
from registry.source import locate
from tuning.charts import importances, pages
from tuning.ending import end_once
from tuning.objective import TrainingObjective
from tuning.outcome import Objective
from tuning.sampling_study import SamplingObjective
from tuning.space import check_space
from tuning.study import WORKER, Worker, join, recorded_source, study_name
from tuning.summary import best_trials, lines
from tuning.winner import register_winner

VERSION_TAG = "registered.version"
"""Of the study's run: what it registered when it was last ended, empty for nothing."""


def tune(config_name: str, flags: Sequence[str]) -> list[str]:
    """Work on a study until its budget is spent; one of the processes ends it.

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
            check_names(config.evaluation, read_source(config).split.classes)
            return work(config, TrainingObjective(config), stop.check)
        config = sampling_configuration(config, tree, config_name, flags)
        return work(config, SamplingObjective(config, stop.check), stop.check)


def sampling_configuration(config: RunConfig, tree: Tree, config_name: str, flags: Sequence[str]) -> RunConfig:
    """What the source was trained with, under what the user stated; a preset states its `tune` section alone.

    Raises:
        UserError: for a source that is not there.
    """
    source = bound_source(config)
    bound = {"tune": {"source": source}}
    own = locate(source).configuration
    if own is None:
        return validate(RunConfig, merge(tree, bound))
    stated = merge({"tune": tree.get("tune", {})}, parse_flags(flags))
    if config_name not in preset_names():
        stated = merge(read_tree(config_name), stated)
    return validate(RunConfig, merge(merge(own, {"resume": "none"}), merge(stated, bound)))


def bound_source(config: RunConfig) -> str:
    """What a sampling study draws with, by a name that never comes to mean another model.

    An alias is looked up when the study is made; the same command goes on with the version it stood for then, also
    after it moved (registering a study's winner moves it).

    Raises:
        UserError: for a source that is not there.
    """
    stated = config.tune.source
    located = locate(stated)
    exact = located.version or located.model_id
    if exact is None:
        return stated
    recorded = recorded_source(config) if "@" in stated else None
    name = stated.partition("@")[0]
    if recorded is None or recorded == f"models:/{exact}" or not recorded.startswith(f"{name}/"):
        return f"models:/{exact}"
    print(
        f"{stated} is models:/{exact} by now; study {study_name(config)} goes on with {recorded}, which it was made "
        "for (give another --tune.study to search for the new one)",
        flush=True,
    )
    return recorded


def work(config: RunConfig, objective: Objective, check_stop: Callable[[], None]) -> list[str]:
    """Take part in the study until its budget is spent and one of its processes has ended it."""
    joined = join(config, objective.names)
    worker = Worker(config, joined, objective)
    with worker.leaving():
        if worker.runs.is_fresh():
            worker.runs.describe(dump_yaml(config), provenance())
        worker.work(check_stop)
        said = lines(worker.study, objective.names)
        end = partial(conclude, config, worker, objective.names, said)
        if not end_once(worker.study, joined.storage, config.tune.trials, end, check_stop):
            worker.runs.close_again(worker.study)
    return [*said, *gate(config, worker, check_stop)]


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
        set_tags(runs.client, runs.parent_id, {"best.trial": trial.number})
        for number, name in enumerate(names):
            runs.client.log_metric(runs.parent_id, f"best/{name}", trial.values[number])
    version: str | None = None
    if best and config.registry.register_model:
        training = config.tune.kind == "training"
        version = register(config, best[0]) if training else register_winner(config, study, best[0], names)
    set_tags(runs.client, runs.parent_id, {VERSION_TAG: version or ""})
    runs.close("FINISHED" if best else "FAILED", "finished" if best else "no trial has a figure")


def gate(config: RunConfig, worker: Worker, check_stop: Callable[[], None]) -> list[str]:
    """Put the version that the study registered through the gate, when asked to, unless it has been.

    One of the processes does, whichever ended the study; a later one where that process died over it. So the gate is
    an ending too, of a study named after the registered model, with the version in the place of the budget.
    """
    client = worker.runs.client
    registered = client.get_run(worker.runs.parent_id).data.tags.get(VERSION_TAG)
    if not config.registry.promote or not registered:
        return []
    uri, said = f"models:/{registered}", list[str]()
    name, version = registered_version(uri)

    def ask() -> None:
        if GATE_TAG not in client.get_model_version(name, str(version)).tags:
            said.extend(promote(PromoteOptions(model=uri), None, []).sentences)

    gates = optuna.create_study(
        storage=worker.storage, study_name=f"{worker.study.study_name}: gate of {name}", load_if_exists=True
    )
    end_once(gates, worker.storage, version, ask, check_stop)
    return said


def register(config: RunConfig, trial: FrozenTrial) -> str | None:
    """Register the best trial's checkpoint, with the guidance it was judged at as its default: `NAME/VERSION`."""
    facts = trial.user_attrs
    bundle = Path(facts["bundle"])
    if not bundle.is_dir():
        print(
            f"not registered: trial {trial.number} was run elsewhere ({facts[WORKER]}), and its files in {bundle} "
            "cannot be seen from here; let the processes share output_dir"
        )
        return None
    version = publish(
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
    return None if version is None else f"{version.name}/{version.version}"
