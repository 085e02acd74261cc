"""Does a registered version load and draw where nothing but the registry is known? Asked in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import mlflow

from dfu_mlflow.phases import phase

CHILD = Path(__file__).with_name("first_pictures_child.py")
SQLITE = "sqlite:///"
TAIL_CHARACTERS = 400
STEPS = 2
"""Of the solver: enough to show that every part is there and fits; how good pictures are is measured elsewhere."""


@dataclass(frozen=True)
class CleanTrial:
    """How it went.

    Attributes:
        passed: a picture of each class that was asked for was drawn, and none is of one colour.
        sentence: the same in words.
        seconds: from start to end, most of it imports and loading.
    """

    passed: bool
    sentence: str
    seconds: float


def try_version(uri: str, timeout_s: float, classes: int | None = None) -> CleanTrial:
    """Load `models:/NAME/VERSION` and draw a picture of each class in few steps.

    Args:
        classes: draw so many of them; None is all.

    The process starts in an empty folder, without this checkout on its path: code and weights are the model's own.
    """
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, phase("trying the version in a process of its own"):
        try:
            done = subprocess.run(
                [sys.executable, "-P", str(CHILD), uri, str(STEPS), str(classes or 0)],
                cwd=folder,
                env=clean_environment(),
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            reason = f"{uri} had not drawn its pictures after {timeout_s:g} s (gates.loads.timeout_s)"
            return CleanTrial(False, reason, time.monotonic() - start_s)
    seconds = time.monotonic() - start_s
    if done.returncode:
        return CleanTrial(False, f"{uri} does not load and draw: {_last_line(done.stderr)}", seconds)
    spread: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    flat = [label for label, deviation in spread.items() if not deviation > 0]
    if flat:
        return CleanTrial(False, f"{uri} draws class {', '.join(flat)} as a picture of one colour", seconds)
    drawn = f"{uri} loaded and drew {', '.join(spread)} in a process of its own, {seconds:.0f} s"
    return CleanTrial(True, drawn, seconds)


def clean_environment() -> dict[str, str]:
    """This process's environment without the checkout and the active run, the tracking store by its whole path."""
    left_out = ("PYTHONPATH", "MLFLOW_RUN_ID")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    return environment | {
        "MLFLOW_TRACKING_URI": absolute_store(mlflow.get_tracking_uri()),
        "MLFLOW_REGISTRY_URI": absolute_store(mlflow.get_registry_uri()),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def absolute_store(uri: str) -> str:
    """`sqlite:///mlflow.db` as a process in another folder must spell it; other stores as they are."""
    if not uri.startswith(SQLITE):
        return uri
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:TAIL_CHARACTERS] if lines else "it ended without a word"
