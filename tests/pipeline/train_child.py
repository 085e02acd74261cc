"""Run by `test_kill_resume` in a forked process, with CONFIG (JSON), STORE (tracking URI) and FOLDER as globals."""

import os

import mlflow
import torch

from dfu_mlflow.config import RunConfig
from dfu_mlflow.pipeline import run_training

os.chdir(globals()["FOLDER"])  # artifacts go below the working directory
mlflow.set_tracking_uri(globals()["STORE"])
torch.set_num_threads(1)
run_training(RunConfig.model_validate_json(globals()["CONFIG"]))
