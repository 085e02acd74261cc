"""`mlflow run . -e test`: lint, format, types and tests; `-P fast=true` leaves the slow tests out."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dfu_mlflow import entry
from dfu_mlflow.config import load
from dfu_mlflow.config.section import Section

ROOT = Path(__file__).resolve().parent.parent


class ChecksConfig(Section):
    """What the `test` entry point takes."""

    fast: bool = False
    """Leave out tests marked slow."""
    only: str | None = None
    """Paths or node ids for pytest, separated by spaces; None runs everything."""
    workers: int = 2
    """Processes of pytest; 0 runs in one."""


def checks(config: ChecksConfig) -> dict[str, list[str]]:
    """Name -> command, in the order they run; pytest stands last, so that its summary ends the output."""
    pytest = ["pytest", "-n", str(config.workers), "--dist", "loadfile", "--durations", "15"]
    if config.fast:
        pytest += ["-m", "not slow"]
    return {
        "ruff check": ["ruff", "check", "."],
        "ruff format": ["ruff", "format", "--check", "."],
        "mypy": ["mypy"],
        "pytest": pytest + (config.only.split() if config.only else []),
    }


def main(arguments: Sequence[str]) -> int:
    """Run every check, even after one failed; 0 if all passed."""
    config = load(ChecksConfig, None, arguments)
    failed = []
    for name, command in checks(config).items():
        print(f"== {name}", flush=True)
        start_s = time.monotonic()
        # One thread a worker: two workers with torch's default of a thread a core fight over the cores.
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), DO_NOT_TRACK="true")
        # `mlflow run` hands its own run to the child; tests that start runs must not write to it.
        for variable in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_URI"):
            environment.pop(variable, None)
        if subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment).returncode:
            failed.append(name)
        elif name != "pytest":
            print(f"{name} passed in {time.monotonic() - start_s:.0f} s", flush=True)
    if failed and failed != ["pytest"]:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(entry.run(main, settings=ChecksConfig))
