"""What is fetched from an MLflow server to be read is gone when the process that read it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest

from dfu_mlflow.config import RunConfig
from registry.package import RegisteredSampler, register_sampler

READ = """
import sys
from registry.source import locate
found = locate(sys.argv[1])
assert (found.folder / "sampler.json").is_file() and found.configuration == {"seed": 3}
print(found.folder)
"""


@pytest.fixture
def served(bundle: Path, tmp_path: Path, wait_for: Callable[..., None]) -> Iterator[RegisteredSampler]:
    """A sampler that was registered through an MLflow server, which keeps its files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts"), "--port", str(port), "--workers", "1"]
    environment = dict(os.environ, MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
            mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
            with mlflow.start_run() as run:
                mlflow.log_text("seed: 3\n", "config.yaml")
            yield register_sampler(bundle, RunConfig(), run.info.run_id, {}, {})
    finally:
        mlflow.set_tracking_uri(None)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(timeout=60)


@pytest.mark.slow
def test_no_copy_of_a_servers_model_or_artifact_is_left_behind(served: RegisteredSampler, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = dict(os.environ, TMPDIR=str(scratch), PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    reader = subprocess.run(
        [sys.executable, "-c", READ, served.uri], env=environment, capture_output=True, text=True, timeout=300
    )
    assert reader.returncode == 0, reader.stderr[-2000:]
    assert Path(reader.stdout.splitlines()[-1]).is_relative_to(scratch), "it was copied"
    assert [path.name for path in scratch.iterdir()] == []
