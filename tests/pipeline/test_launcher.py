"""`--launch ddp --processes 2` as a user types it: how it ends, with which code, and what is said about it, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import dump_yaml
from tests.stores import new_store

ROOT = Path(__file__).resolve().parents[2]
SOON_S = 25.0
"""Below the 30 s that torchelastic gives processes to end by themselves."""
LONG = ["--train.steps_per_epoch", "2000", "--checkpoint.every_steps", "2", "--evaluation.samples", "12"]


class Launcher:
    """Types the command in a folder of its own."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.folder = folder
        new_store(folder)
        (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")

    def start(self, *flags: str, launch: str = "ddp") -> subprocess.Popen[str]:
        """Start it; stderr is kept."""
        command = [sys.executable, "-m", "entrypoints.train", "--config", "config.yaml", *flags]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, "--launch", launch, "--processes", "2"],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def steps(self) -> list[int]:
        """Checkpoints that were written."""
        return sorted(int(path.parent.name[5:]) for path in self.folder.glob("out/*/checkpoints/step-*/state.json"))

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        """Wait for a checkpoint of this step or a later one."""
        deadline_s = time.monotonic() + 240
        while not any(found >= step for found in self.steps()):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline_s
            time.sleep(0.2)

    def run(self) -> Run:
        """The only MLflow run."""
        client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        (run,) = client.search_runs([client.get_experiment_by_name("dfu-mlflow").experiment_id])
        return run


def rank(process: subprocess.Popen[str], index: int) -> psutil.Process:
    """A process that the launcher has started."""
    return next(child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == str(index))


def told(process: subprocess.Popen[str]) -> list[str]:
    """How the run says that it ended, once the process has."""
    _, errors = process.communicate(timeout=280)
    assert "Traceback" not in errors, errors
    return [line for line in errors.splitlines() if line.startswith(("error:", "interrupted:"))]


@pytest.fixture
def launcher(small_config_at: Callable[[Path], RunConfig], tmp_path: Path) -> Launcher:
    return Launcher(small_config_at(tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["ddp", "zero3"])
def test_a_launched_run_finishes(launch: str, launcher: Launcher) -> None:
    """And is registered: a base that is loaded behind ZeRO-3's engine is no business of the other ranks."""
    process = launcher.start(launch=launch)
    assert told(process) == []
    assert process.returncode == 0
    run = launcher.run()
    assert run.info.status == "FINISHED"
    assert run.data.params["cfg/runtime.num_processes"] == "2"
    assert launcher.steps()[-1] == 6
    (version,) = MlflowClient(f"sqlite:///{launcher.folder}/mlflow.db").search_model_versions("name='dfu-sampler'")
    assert version.run_id == run.info.run_id


@pytest.mark.slow
def test_an_error_of_the_user_is_told_once(launcher: Launcher) -> None:
    process = launcher.start("--data.root", str(launcher.folder / "nowhere"))
    (line,) = told(process)
    assert process.returncode == 2
    assert "nowhere" in line
    assert "rank 0" not in line, "what the first process says, not what the others hear of it"


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_soon_and_sigterm_with_a_checkpoint(launcher: Launcher) -> None:
    process = launcher.start(*LONG)
    launcher.wait_for_step(2, process)
    rank(process, 1).send_signal(signal.SIGKILL)
    killed_s = time.monotonic()
    (line,) = told(process)
    assert time.monotonic() - killed_s < SOON_S
    assert process.returncode == 2
    assert "rank 1 of 2 ended without a word" in line
    assert launcher.run().info.status == "FAILED"

    before = launcher.steps()[-1]
    process = launcher.start(*LONG, "--resume", "latest")
    launcher.wait_for_step(before + 2, process)
    process.send_signal(signal.SIGTERM)
    (line,) = told(process)
    assert process.returncode == 130
    assert line == f"interrupted: stopped after step {launcher.steps()[-1]}"
    assert launcher.run().info.status == "KILLED"
