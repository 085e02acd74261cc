"""Run by `test_kill_resume` in a forked process, with CONFIG (JSON) and STORE (tracking URI) as globals."""

import mlflow
import torch

from dfu_mlflow.config import RunConfig
from dfu_mlflow.pipeline import run_training

mlflow.set_tracking_uri(globals()["STORE"])
torch.set_num_threads(1)
run_training(RunConfig.model_validate_json(globals()["CONFIG"]))
