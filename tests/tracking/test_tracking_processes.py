"""What takes processes: SIGKILL in the middle of logging, many processes at a new store, system metrics."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from dfu_mlflow.config import RunConfig
from dfu_mlflow.tracking import track

CONFIG = RunConfig.model_validate({"tracking": {"system_metrics": False}})

LOGGING_PROGRAM = """
import sys
from pathlib import Path
from dfu_mlflow.config import RunConfig
from dfu_mlflow.tracking import track

with track(RunConfig.model_validate({"tracking": {"system_metrics": False}})) as tracker:
    Path("run_id").write_text(tracker.run_id)
    for step in range(1, 10_000_000):
        tracker.step(step, {"step/loss": 1 / step})
        if step % 50 == 0:
            tracker.flush()
            Path("checkpoint.new").write_text(str(step))
            Path("checkpoint.new").replace("checkpoint")
"""

OPENING_PROGRAM = """
from dfu_mlflow.tracking_store import prepare_store
prepare_store()
"""


def start(program: str) -> subprocess.Popen[bytes]:
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parents[2]))
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.usefixtures("store")
def test_sigkill_leaves_no_gap_and_resuming_doubles_nothing(tmp_path: Path) -> None:
    process = start(LOGGING_PROGRAM)
    deadline_s = time.monotonic() + 120
    while not (tmp_path / "checkpoint").exists() or int((tmp_path / "checkpoint").read_text()) < 300:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    checkpoint = int((tmp_path / "checkpoint").read_text())
    run_id = (tmp_path / "run_id").read_text()
    assert mlflow.get_run(run_id).info.status == "RUNNING"

    with track(CONFIG, run_id) as tracker:
        for step in range(checkpoint + 1, checkpoint + 101):
            tracker.step(step, {"step/loss": 1 / step})
    history = MlflowClient().get_metric_history(run_id, "step/loss")
    assert [point.step for point in history] == list(range(1, checkpoint + 101))
    assert all(point.value == 1 / point.step for point in history)
    assert mlflow.get_run(run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_processes_that_open_a_new_store_at_once_all_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'new.db'}")
    processes = [start(OPENING_PROGRAM) for _ in range(2)]
    errors = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


@pytest.mark.usefixtures("store")
def test_system_metrics_go_on_after_a_resume_and_stop_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    config = RunConfig()
    run_id: str | None = None
    for _ in range(2):
        with track(config, run_id) as tracker:
            run_id = tracker.run_id
            time.sleep(0.4)
        assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}
    assert run_id is not None
    steps = [point.step for point in MlflowClient().get_metric_history(run_id, "system/system_memory_usage_percentage")]
    assert steps == list(range(len(steps)))
    assert len(steps) >= 2
