"""Which process runs which trial: an exact budget over all of them, signs of life, retries.

A study's trials are rows in its database. A trial that is not a retry is an *original*; the first `tune.trials`
originals, by number, are the budget. Numbers never change, so every process sees the same ones without a lock; a trial
is taken by its change from WAITING to RUNNING, which the database grants to one process only.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from dfu_mlflow.config.tuning import TuneConfig
from dfu_mlflow.runtime import derive_seed

logger = logging.getLogger(__name__)

GRACE_HEARTBEATS = 3
"""Missed in a row, they mean that the worker is dead."""
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def is_retry(trial: FrozenTrial) -> bool:
    """Was it made to repeat another one?"""
    return bool(RetryHeartbeatStaleTrialCallback.retry_history(trial))


def budgeted(study: optuna.Study, budget: int) -> list[FrozenTrial]:
    """Trials that count: the first `budget` originals, and every retry."""
    trials = study.get_trials(deepcopy=False)
    originals = [trial.number for trial in trials if not is_retry(trial)][:budget]
    return [trial for trial in trials if is_retry(trial) or trial.number in originals]


def claim(study: optuna.Study, storage: RDBStorage, budget: int) -> int | None:
    """Take a trial for this process, making one while the budget allows; its number, None when none is left."""
    study_id = storage.get_study_id_from_name(study.study_name)
    while True:
        trials = budgeted(study, budget)
        for trial in trials:
            if trial.state == TrialState.WAITING and _taken(study_id, storage, trial.number):
                return trial.number
        if sum(not is_retry(trial) for trial in trials) >= budget:
            return None
        # Two processes may both add one: what is beyond the budget waits there for a larger one.
        study.enqueue_trial({})


def _taken(study_id: int, storage: RDBStorage, number: int) -> bool:
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
    try:
        return storage.set_trial_state_values(trial_id, state=TrialState.RUNNING)
    except UpdateFinishedTrialError:
        return False


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
    RetryHeartbeatStaleTrialCallback(max_retry=max_retries)(study, trial)


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
