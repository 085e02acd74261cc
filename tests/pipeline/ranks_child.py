"""Run by `test_ranks` in a forked process, with CONFIG (JSON), FOLDER, DIES, AFTER and ENVIRONMENT."""

import os
import signal
import time
from contextlib import redirect_stderr
from pathlib import Path

import mlflow
import torch

from dfu_mlflow import entry
from dfu_mlflow.config import RunConfig
from dfu_mlflow.pipeline import run_training
from dfu_mlflow.sampling import Sampler

given = globals()
os.environ.update(given["ENVIRONMENT"])
os.chdir(given["FOLDER"])  # artifacts go below the working directory
mlflow.set_tracking_uri(f"sqlite:///{given['FOLDER']}/mlflow.db")
torch.set_num_threads(1)
generate, calls = Sampler.generate, []


def die(*arguments: object, **named: object) -> object:
    calls.append(1)
    if len(calls) > int(given["AFTER"]):
        if given["DIES"] == "HANG":
            while True:  # signs of life go on
                time.sleep(1)
        Path("died").touch()
        os.kill(os.getpid(), getattr(signal, given["DIES"]))
    return generate(*arguments, **named)  # type: ignore[arg-type]


if given["DIES"]:
    Sampler.generate = die  # type: ignore[assignment, method-assign]


def main(_: object) -> int:
    run_training(RunConfig.model_validate_json(given["CONFIG"]))
    return 0


# The server that forks these processes keeps the terminal of the test that started it.
with (
    open(f"rank{os.environ.get('RANK', '0')}.err", "a", encoding="utf-8", buffering=1) as errors,
    redirect_stderr(errors),
):
    code = entry.run(main, [])
if code:
    raise SystemExit(code)
