"""Several real processes on one SQLite file: each trial is one process's, and one process ends the study."""

from __future__ import annotations

import multiprocessing
import runpy
import signal
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import optuna
import pytest
from filelock import FileLock, Timeout
from optuna.trial import TrialState

from dfu_mlflow.config.tuning import TuneConfig
from tuning.claims import REASON, claim, file_lock, give_up_dead, open_database, open_trials, retry
from tuning.ending import end_once

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def child(name: str, **names: object) -> BaseProcess:
    """A process that runs a file beside this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tuning.ending", "tests.frozen"])
    process = context.Process(target=runpy.run_path, args=(str(Path(__file__).with_name(name)), names))
    process.start()
    return process


def codes(processes: Sequence[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(90)
    return [process.exitcode for process in processes]


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    storage = open_database(f"sqlite:///{tmp_path}/optuna.db", TuneConfig(heartbeat_s=1), retry)
    return optuna.create_study(storage=storage, study_name="one")


def lines_of(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def test_no_two_processes_take_the_same_trial(study: optuna.Study, tmp_path: Path) -> None:
    for _ in range(12):
        study.enqueue_trial({})
    answers = [tmp_path / str(number) for number in range(3)]
    url = f"sqlite:///{tmp_path}/optuna.db"
    workers = [child("claim_child.py", URL=url, BUDGET=12, ANSWER=str(answer)) for answer in answers]
    assert codes(workers) == [0, 0, 0]
    taken = sorted(int(word) for answer in answers for word in answer.read_text(encoding="utf-8").split())
    assert taken == list(range(12))


def test_a_study_is_ended_once_though_its_first_process_is_killed_over_it(study: optuna.Study, tmp_path: Path) -> None:
    url, log = f"sqlite:///{tmp_path}/optuna.db", tmp_path / "log"
    names = {"URL": url, "LOG": str(log), "HANGS": False}
    victim = child("ending_child.py", **names | {"HANGS": True})
    deadline = time.monotonic() + 60
    while not lines_of(log):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    others = [child("ending_child.py", **names) for _ in range(2)]
    time.sleep(1.0)
    victim.kill()
    assert codes([victim, *others]) == [-signal.SIGKILL, 0, 0]
    words = [line.split() for line in lines_of(log)]
    assert [word for word, _ in words] == ["begun", "begun", "ended", "left", "left"]
    assert words[1][1] == words[2][1] != str(victim.pid)
    late = child("ending_child.py", **names)
    assert codes([late]) == [0]
    assert [line.split()[0] for line in lines_of(log)][5:] == ["left"]


def test_a_trial_whose_worker_died_before_its_first_sign_of_life_is_tried_again(study: optuna.Study) -> None:
    storage = study._storage._backend  # type: ignore[attr-defined]
    assert claim(study, storage, 1) == 0  # and nothing more is heard of it
    deadline = time.monotonic() + 30
    while len(study.trials) == 1:
        assert time.monotonic() < deadline
        give_up_dead(study, storage)
        time.sleep(0.5)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]


def test_a_trial_that_was_given_up_and_not_queued_again_is_not_lost(study: optuna.Study) -> None:
    storage = study._storage._backend  # type: ignore[attr-defined]
    for attributes in ({}, {REASON: "UserError: cannot be trained"}):
        study.add_trial(optuna.create_trial(state=TrialState.FAIL, user_attrs=attributes))
    assert open_trials(study, budget=2, max_retries=1) == [0], "the budget is not spent"
    assert open_trials(study, budget=2, max_retries=0) == []
    for _ in range(2):
        give_up_dead(study, storage)
    assert [trial.system_attrs.get("retry_history") for trial in study.trials] == [None, None, [0]]


def test_of_two_retries_of_one_trial_the_first_counts(study: optuna.Study) -> None:
    """Where no lock holds processes apart, two may queue the same trial again."""
    storage = study._storage._backend  # type: ignore[attr-defined]
    study.add_trial(optuna.create_trial(state=TrialState.FAIL))
    for _ in range(2):
        retry(study, study.trials[0])
    assert claim(study, storage, budget=1) == 1
    assert claim(study, storage, budget=1) is None
    assert open_trials(study, budget=1, max_retries=2) == [1]
    study.tell(1, state=TrialState.FAIL)
    retry(study, study.trials[1])
    assert claim(study, storage, budget=1) == 3, "a retry of the retry is another one"


@pytest.mark.parametrize("driver", ["sqlite", "sqlite+pysqlite"])
def test_a_sqlite_file_is_locked_whatever_its_driver_is_called(driver: str, tmp_path: Path) -> None:
    with file_lock(f"{driver}:///{tmp_path}/optuna.db?timeout=3"):
        held = FileLock(tmp_path / "optuna.db.lock")
        with pytest.raises(Timeout):
            held.acquire(timeout=0)


def test_a_larger_budget_is_another_ending_and_a_smaller_one_is_none(study: optuna.Study) -> None:
    storage, concluded = study._storage._backend, list[int]()  # type: ignore[attr-defined]
    for budget in (3, 3, 2, 5):
        end_once(study, storage, budget, partial(concluded.append, budget), lambda: None)
    assert concluded == [3, 5]


def test_an_ending_that_raises_is_taken_up_again(study: optuna.Study) -> None:
    storage = study._storage._backend  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        end_once(study, storage, 3, lambda: print(1 / 0), lambda: None)
    assert end_once(study, storage, 3, lambda: None, lambda: None)
    assert not end_once(study, storage, 3, lambda: None, lambda: None)
