"""Run by `test_ranks` in a forked process, with CONFIG (JSON), FOLDER, DIES (where to be killed) and ENVIRONMENT."""

import os
import signal

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
if given["DIES"]:
    Sampler.generate = lambda *_, **__: os.kill(os.getpid(), getattr(signal, given["DIES"]))  # type: ignore[assignment]


def main(_: object) -> int:
    run_training(RunConfig.model_validate_json(given["CONFIG"]))
    return 0


code = entry.run(main, [])
if code:
    raise SystemExit(code)
