"""What a search over guidance costs: one training swept after it, against one training for each value.

    python -m benchmarks.guidance_search [--config tiny] [--section.field value]

Both judge the same values on the same pictures; the figures of the two are printed beside the times.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import mlflow
import optuna

from dfu_mlflow import entry
from dfu_mlflow.config import RunConfig, load
from dfu_mlflow.pipeline import run_training
from tuning.objective import TrainingObjective, trial_config
from tuning.space import with_values


def main(arguments: Sequence[str]) -> int:
    """Time both on the same machine, one after the other."""
    options, flags = entry.split(arguments, {"config": "tiny"})
    with tempfile.TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        config = load(RunConfig, options["config"], [*flags, "--output_dir", str(Path(folder) / "out")])
        values = sorted({*config.tune.guidance, config.sampling.guidance_scale})
        run_training(with_values(trial_config(config), {"train.epochs": 1, "train.steps_per_epoch": 1}))  # fills caches

        started = time.perf_counter()
        retrained = {}
        for guidance in values:
            result = run_training(with_values(trial_config(config), {"sampling.guidance_scale": guidance}))
            group = "eval" if result.shown == "live" else "eval_ema"
            retrained[guidance] = result.figures[f"{group}/{config.evaluation.best_metric}"]
        retraining_s = time.perf_counter() - started

        started = time.perf_counter()
        objective = TrainingObjective(config)
        trial = optuna.create_study().ask()
        run_id = mlflow.MlflowClient().create_run("0").info.run_id
        swept = {point[0]: point[1] for point in objective(trial, {}, str(run_id)).facts["curve"]}
        sweeping_s = time.perf_counter() - started
    for guidance in values:
        print(f"guidance {guidance:g}: retrained {retrained[guidance]:.4g}, swept {swept[guidance]:.4g}")
    print(
        f"{len(values)} trainings {retraining_s:.0f} s, one swept {sweeping_s:.0f} s: {retraining_s / sweeping_s:.1f} x"
    )
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main))
