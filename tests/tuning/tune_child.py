"""Run by tests in a forked process, with FILE and FLAGS (of `tune`), STORE (tracking URI) and FOLDER as globals."""

import os

import mlflow
import torch

from tuning.tune import tune

os.chdir(globals()["FOLDER"])
mlflow.set_tracking_uri(globals()["STORE"])
torch.set_num_threads(1)
tune(globals()["FILE"], globals()["FLAGS"])
