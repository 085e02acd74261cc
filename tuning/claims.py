"""Which process runs which trial: an exact budget over all of them, signs of life, retries.

A study's trials are rows in its database. A trial that is not a retry is an *original*; the first `tune.trials`
originals, by number, are the budget. Numbers never change, so every process sees the same ones without a lock; a trial
is taken by its change from WAITING to RUNNING, which the database grants to one process only: by SELECT FOR UPDATE, or
on SQLite, which has none, under a lock on a file beside it. A dead worker's trial is queued again by one process: under
that lock, or PostgreSQL's advisory lock.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Engine, func, select
from sqlalchemy.engine import make_url

from dfu_mlflow.config.tuning import TuneConfig
from dfu_mlflow.runtime import derive_seed

logger = logging.getLogger(__name__)

GRACE_HEARTBEATS = 3
"""Missed in a row, they mean that the worker is dead."""
REASON = "reason"
"""Attribute of a trial that failed by itself; the others are tried again."""
ADVISORY_KEY = 0x64667574756E65
"""Number of PostgreSQL's advisory lock, per database: "dfutune" in ASCII."""
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def history(trial: FrozenTrial) -> tuple[int, ...]:
    """Numbers of the trials that it repeats, oldest first; empty for an original."""
    return tuple(RetryHeartbeatStaleTrialCallback.retry_history(trial))


def budgeted(study: optuna.Study, budget: int) -> list[FrozenTrial]:
    """Trials that count: the first `budget` originals, and the first retry of each trial.

    Where there is no lock two processes may queue the same trial again: the second retry is never taken.
    """
    trials = study.get_trials(deepcopy=False)
    originals = [trial for trial in trials if not history(trial)][:budget]
    retries: dict[tuple[int, ...], FrozenTrial] = {}
    for trial in trials:
        if history(trial):
            retries.setdefault(history(trial), trial)
    return sorted([*originals, *retries.values()], key=lambda trial: trial.number)


def lost(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that failed through no fault of their own and were not queued again: their process died over it."""
    trials = study.get_trials(deepcopy=False)
    retried = {number for trial in trials for number in history(trial)}
    failed = [trial for trial in trials if trial.state == TrialState.FAIL and trial.number not in retried]
    return [trial for trial in failed if REASON not in trial.user_attrs]


def open_trials(study: optuna.Study, budget: int, max_retries: int) -> list[int]:
    """Trials of the budget that have not ended, or that are about to be queued again."""
    again = {trial.number for trial in lost(study) if len(history(trial)) < max_retries}
    return [t.number for t in budgeted(study, budget) if t.state not in FINISHED or t.number in again]


def claim(study: optuna.Study, storage: RDBStorage, budget: int) -> int | None:
    """Take a trial for this process, making one while the budget allows; its number, None when none is left."""
    study_id = storage.get_study_id_from_name(study.study_name)
    while True:
        trials = budgeted(study, budget)
        for trial in trials:
            if trial.state == TrialState.WAITING and _taken(study_id, storage, trial.number):
                return trial.number
        if sum(not history(trial) for trial in trials) >= budget:
            return None
        # Two processes may both add one: what is beyond the budget waits there for a larger one.
        study.enqueue_trial({})


def _taken(study_id: int, storage: RDBStorage, number: int) -> bool:
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
    # Before the change: a process killed right after it would leave a trial that never showed a sign of life, and
    # Optuna gives up only those whose signs have stopped.
    storage.record_heartbeat(trial_id)
    try:
        with alone(storage):
            return storage.set_trial_state_values(trial_id, state=TrialState.RUNNING)
    except UpdateFinishedTrialError:
        return False


def alone(storage: RDBStorage) -> AbstractContextManager[Any]:
    """One process at a time, where the database is a SQLite file or PostgreSQL; not to be nested."""
    postgresql = storage.engine.dialect.name == "postgresql"
    return _advisory_lock(storage.engine) if postgresql else file_lock(storage.url)


@contextmanager
def _advisory_lock(engine: Engine) -> Iterator[None]:
    """Held by a connection of its own: PostgreSQL frees it when that ends, so a killed process holds nothing."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(select(func.pg_advisory_lock(ADVISORY_KEY)))
        try:
            yield
        finally:
            connection.execute(select(func.pg_advisory_unlock(ADVISORY_KEY)))


def file_lock(url: str) -> AbstractContextManager[Any]:
    """A lock on a file beside a SQLite database, for there two may read a row before either writes it; else nothing."""
    address = make_url(url)  # the driver may be named: sqlite+pysqlite:///
    file = Path((address.database or "").removeprefix("file:"))
    in_file = address.get_backend_name() == "sqlite" and file.name not in ("", ":memory:") and file.parent.is_dir()
    return FileLock(f"{file}.lock") if in_file else nullcontext()


def give_up_dead(study: optuna.Study, storage: RDBStorage) -> None:
    """Fail trials whose worker shows no sign of life and queue them again.

    So are those that are `lost`, at once: another process may be about to queue one as well, but one retry counts.
    """
    queue = storage.get_heartbeat_stale_trial_callback()
    assert queue is not None  # `open_database` sets it
    with alone(storage):
        optuna.storages.fail_stale_trials(study)
        for trial in lost(study):
            queue(study, copy.deepcopy(trial))


@contextmanager
def heartbeat(storage: RDBStorage, trial_id: int, every_s: float) -> Iterator[None]:
    """Sign of life of a running trial, written from a thread while the block runs.

    Optuna's own runs inside `Study.optimize` only, which cannot hold a budget over several processes.
    """
    storage.record_heartbeat(trial_id)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(every_s):
            try:
                storage.record_heartbeat(trial_id)
            except Exception as error:  # a database that is away for a moment ends no training
                logger.warning("no sign of life could be written: %s", error)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def retry(study: optuna.Study, trial: FrozenTrial, max_retries: int | None = None) -> None:
    """Queue a trial that ended through no fault of its settings again, with the same values."""
    again = copy.deepcopy(trial)  # what queues it changes it
    again.user_attrs.pop(REASON, None)
    RetryHeartbeatStaleTrialCallback(max_retry=max_retries)(study, again)


def build_sampler(tune: TuneConfig, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of one trial: seeded by its number, so that workers and restarts never repeat each other's draws."""
    seed = derive_seed(tune.seed, "tune", number) % 2**32
    if tune.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if tune.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=tune.population, seed=seed)
    return optuna.samplers.TPESampler(n_startup_trials=tune.startup_trials, seed=seed)


def build_pruner(tune: TuneConfig, epochs: int) -> optuna.pruners.BasePruner:
    """The pruner: a study does not keep it, so every process builds the same."""
    if tune.pruner == "none" or tune.kind == "sampling":
        return optuna.pruners.NopPruner()
    if tune.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=tune.reduction_factor)
    return optuna.pruners.HyperbandPruner(
        min_resource=1, max_resource=max(epochs, 1), reduction_factor=tune.reduction_factor
    )


OnStale = Callable[[optuna.Study, FrozenTrial], None]


def open_database(url: str, tune: TuneConfig, on_stale: OnStale) -> RDBStorage:
    """Connect; raises whatever the database's driver raises."""
    waits = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    return RDBStorage(
        url,
        engine_kwargs=waits,
        heartbeat_interval=tune.heartbeat_s,
        grace_period=GRACE_HEARTBEATS * tune.heartbeat_s,
        heartbeat_stale_trial_callback=on_stale,
    )
