"""A child process that hands out figures while it works, and is ended with everything it started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.cuda_cases import Request

ROOT = Path(__file__).resolve().parent.parent


def run_child(
    request: Request, environment: Mapping[str, str], log: Path, limit_s: float, take: Callable[[dict[str, Any]], None]
) -> int:
    """Run `benchmarks.cuda_child` and hand on its figures as they come.

    Args:
        environment: of the child.
        log: gets what it prints.
        limit_s: after which it is killed.
        take: called with each line of figures.

    Returns:
        Its exit code; -9 where the time was up.
    """
    receiving, sending = os.pipe()
    # In the request's folder: MLflow puts artifacts below the working directory.
    with log.open("wb") as output, os.fdopen(receiving, encoding="utf-8") as figures:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cuda_child", json.dumps(request.tree()), str(sending)],
            cwd=request.folder,
            env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])},
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[sending],
            start_new_session=True,
        )
        os.close(sending)
        timer = threading.Timer(max(limit_s, 0.0), _kill, [child])
        timer.start()
        try:
            for line in figures:
                take(json.loads(line))
            return child.wait()
        finally:
            timer.cancel()
            _kill(child)
            child.wait()


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the child and what it started: a process of its own session."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
