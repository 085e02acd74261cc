"""A study that several processes work on: joined by name, resumed by the same command, ended once."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import flatten, without_password
from dfu_mlflow.errors import Interrupted, Pruned, UserError
from dfu_mlflow.tracking import masked
from dfu_mlflow.verdict import larger_is_better
from tuning.claims import (
    FINISHED,
    REASON,
    alone,
    build_pruner,
    build_sampler,
    claim,
    file_lock,
    give_up_dead,
    heartbeat,
    open_database,
    open_trials,
    retry,
)
from tuning.ending import ENDED
from tuning.nested_runs import RUN_ATTRIBUTE, StudyRuns, open_runs
from tuning.outcome import Objective
from tuning.space import check_space, common_settings, describe_space, suggest

WORKER = "worker"
POLL_S = 2.0
INTERRUPTED = "interrupted; queued again"
SMALLER_IS_BETTER = ("seconds_per_image",)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Joined:
    """A study that this process takes part in.

    Attributes:
        study: Optuna's.
        storage: its database.
        created: did this process make it?
    """

    study: optuna.Study
    storage: RDBStorage
    created: bool


def study_name(config: RunConfig) -> str:
    """As configured, or by the kind."""
    return config.tune.study or f"dfu-{config.tune.kind}"


def directions(names: tuple[str, ...]) -> list[StudyDirection]:
    """Which way each objective is better."""
    return [
        StudyDirection.MAXIMIZE if name not in SMALLER_IS_BETTER and larger_is_better(name) else StudyDirection.MINIMIZE
        for name in names
    ]


def join(config: RunConfig, names: tuple[str, ...]) -> Joined:
    """Open the study of this name, or make it.

    Raises:
        UserError: for a database that cannot be opened, a space that does not fit the configuration, or a study that
            was made for something else.
    """
    check_space(config)
    quiet_optuna()
    storage = _open(config)
    name = study_name(config)
    try:
        study_id = storage.create_new_study(directions(names), name)
        created = True
        storage.set_study_user_attr(study_id, "made_for", made_for(config, names))
    except DuplicatedStudyError:
        created = False
    study = optuna.load_study(
        study_name=name, storage=storage, pruner=build_pruner(config.tune, config.tune.epochs or config.train.epochs)
    )
    if not created:
        _require_same(study, config, names)
    return Joined(study, storage, created)


def recorded_source(config: RunConfig) -> str | None:
    """What a study of this name was made to draw with; None where there is no such study.

    Raises:
        UserError: for a database that cannot be opened.
    """
    quiet_optuna()
    storage = _open(config)
    try:
        study_id = storage.get_study_id_from_name(study_name(config))
    except KeyError:
        return None
    return dict(storage.get_study_user_attrs(study_id).get("made_for", {})).get("source")


def made_for(config: RunConfig, names: tuple[str, ...]) -> dict[str, Any]:
    """What all processes of a study must agree on."""
    tune = config.tune
    settings = common_settings(config) | {
        f"tune.{key}": getattr(tune, key)
        for key in ("epochs", "steps_per_epoch", "samples", "samples_per_setting", "pruner", "reduction_factor")
    }
    settings["tune.guidance"] = list(tune.guidance)
    return {
        "kind": tune.kind,
        "objectives": list(names),
        "space": describe_space(tune.effective_space()),
        "source": tune.source if tune.kind == "sampling" else None,
        "settings": settings,
    }


def _require_same(study: optuna.Study, config: RunConfig, names: tuple[str, ...]) -> None:
    wanted = made_for(config, names)
    deadline = time.monotonic() + 10.0
    while "made_for" not in study.user_attrs and time.monotonic() < deadline:
        time.sleep(0.2)  # the process that made the study writes it next
    found = study.user_attrs.get("made_for")
    if found is None:
        raise UserError(f"--tune.study {study.study_name} was not made by `tune`: give another name")
    differing = [
        f"{key} was {found[key]}, is {wanted[key]}"
        for key in ("kind", "objectives", "source", "space")
        if found[key] != wanted[key]
    ]
    before, now = flatten(RunConfig()) | found["settings"], wanted["settings"]  # a setting may be newer than the study
    differing += [
        f"--{key} was {before.get(key)!r}, is {now[key]!r}" for key in now if before.get(key, "not set") != now[key]
    ]
    if differing:
        raise UserError(
            f"--tune.study {study.study_name} was made for something else, and its figures cannot be compared: "
            f"{'; '.join(differing)}; give the same settings or another --tune.study"
        )


def quiet_optuna() -> None:
    """Its log repeats what this program prints; heartbeats have been called experimental since 2021."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)


def _open(config: RunConfig) -> RDBStorage:
    url, tune = config.tune.storage, config.tune

    def on_stale(study: optuna.Study, trial: FrozenTrial) -> None:
        retry(study, trial, tune.max_retries if study.study_name == study_name(config) else None)

    problem = ""
    for attempt in range(3):
        try:
            with file_lock(url):
                return open_database(url, tune, on_stale)
        except Exception as error:  # each driver has its own; two processes that make the tables at once collide
            problem = " ".join(str(error).split())[:300]
            time.sleep(attempt)
    raise UserError(
        f"--tune.storage {without_password(url)} cannot be opened: {without_password(problem)}; give "
        "sqlite:///FILE.db, or postgresql://USER@HOST/NAME (password in PGPASSWORD) of a server that runs"
    )


class Worker:
    """One process's part in a study.

    Args:
        config: the study's.
        joined: the study.
        objective: tries one setting.
    """

    def __init__(self, config: RunConfig, joined: Joined, objective: Objective) -> None:
        self.config = config
        self.study, self.storage = joined.study, joined.storage
        self.objective = objective
        self.runs: StudyRuns = open_runs(joined.study, joined.created, config.tracking.experiment)
        self.name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"
        self.number: int | None = None
        self.failures: list[int] = []

    def work(self, check_stop: Callable[[], None]) -> None:
        """Run trials until the budget is spent and every trial of it, also of other processes, has ended.

        Args:
            check_stop: called between trials; raises to stop.

        Raises:
            UserError: after several trials in a row without a figure.
            Interrupted: when asked to stop; the trial is queued again.
        """
        budget, told = self.config.tune.trials, False
        while True:
            check_stop()
            give_up_dead(self.study, self.storage)
            number = claim(self.study, self.storage, budget)
            if number is not None:
                self.run(number)
                continue
            left = open_trials(self.study, budget, self.config.tune.max_retries)
            if not left:
                return
            if not told:
                print(f"waiting for trials of other processes: {', '.join(map(str, left))}", flush=True)
                told = True
            time.sleep(POLL_S)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """A process that stops early ends the study's run, unless others work on."""
        try:
            yield
        except BaseException as error:
            self.runs.close_orphans(self.study)
            running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if self.study.user_attrs.get(ENDED, 0) >= self.config.tune.trials:
                self.runs.close_again(self.study)
            elif all(trial.number == self.number for trial in running):  # its own, when even that could not be ended
                stopped = isinstance(error, Interrupted | KeyboardInterrupt)
                self.runs.close("KILLED" if stopped else "FAILED", masked(error) or "stopped")
            raise

    def run(self, number: int) -> None:
        """One trial from its nested run to its end."""
        self.number, run_id = number, None
        study_id = self.storage.get_study_id_from_name(self.study.study_name)
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(study_id, number)
        self.study.sampler = build_sampler(self.config.tune, number)
        with heartbeat(self.storage, trial_id, self.config.tune.heartbeat_s):
            trial = optuna.Trial(self.study, trial_id)
            try:
                frozen = self.study.get_trials(deepcopy=False)[number]
                run_id = self.runs.open_trial(number, RetryHeartbeatStaleTrialCallback.retried_trial_number(frozen))
                trial.set_user_attr(RUN_ATTRIBUTE, run_id)
                trial.set_user_attr(WORKER, self.name)
                self.attempt(trial, run_id)
            except (KeyboardInterrupt, Interrupted):
                self.end(trial, run_id, TrialState.FAIL, INTERRUPTED)
                raise
            except Exception as error:
                logger.error("trial %d: %s", number, error, exc_info=not isinstance(error, UserError))
                reason = f"{type(error).__name__}: {masked(error)}"
                with suppress(UpdateFinishedTrialError):  # given up by others, who queued it again
                    trial.set_user_attr(REASON, reason)
                self.end(trial, run_id, TrialState.FAIL, reason)
                self.count_failure(number, reason)
        self.tidy()

    def attempt(self, trial: optuna.Trial, run_id: str) -> None:
        """Draw values, try them, tell the study."""
        values = suggest(trial, self.config)
        self.runs.values(run_id, values)
        try:
            outcome = self.objective(trial, values, run_id)
        except Pruned as error:
            self.end(trial, run_id, TrialState.PRUNED, str(error))
            return
        for key, value in (outcome.facts | {"intervals": outcome.intervals}).items():
            trial.set_user_attr(key, value)
        self.end(trial, run_id, TrialState.COMPLETE, "finished", outcome.values)
        self.failures.clear()

    def end(
        self,
        trial: optuna.Trial,
        run_id: str | None,
        state: TrialState,
        reason: str,
        values: tuple[float, ...] | None = None,
    ) -> None:
        """Tell the study and MLflow how a trial ended; one that others gave up meanwhile stays given up."""
        with alone(self.storage):
            told = self.study.tell(trial, values, state, skip_if_finished=True)
            if reason == INTERRUPTED:  # before MLflow, which may be gone
                retry(self.study, told)
        if run_id is not None:
            self.runs.close_trial(run_id, told.state, reason)
        shown = "" if values is None else f" {', '.join(f'{value:.4g}' for value in values)}"
        print(
            f"trial {trial.number}: {told.state.name}{shown}{'' if reason == 'finished' else f', {reason}'}", flush=True
        )

    def count_failure(self, number: int, reason: str) -> None:
        """Stop when no setting works: then it is not the settings, and they are queued again."""
        self.failures.append(number)
        if len(self.failures) < self.config.tune.max_failures:
            return
        trials = self.study.get_trials(deepcopy=False)
        with alone(self.storage):
            for failed in self.failures:
                retry(self.study, trials[failed], self.config.tune.max_retries)
        raise UserError(
            f"{len(self.failures)} trials in a row gave no figure (--tune.max_failures), the last one: {reason}; mend "
            "that, and the same command tries them again"
        )

    def tidy(self) -> None:
        """Keep the weights of the best trial only: a study of SDXL would fill any disk."""
        trials = self.study.get_trials(deepcopy=False, states=FINISHED)
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        best = {trial.number for trial in (self.study.best_trials if complete else [])}
        for trial in trials:
            if "folder" not in trial.user_attrs:
                continue
            folder = Path(trial.user_attrs["folder"])
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # left by a process that was killed
            if trial.number not in best:
                shutil.rmtree(folder / "sampler", ignore_errors=True)
