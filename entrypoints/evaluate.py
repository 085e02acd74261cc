"""`mlflow run . -e evaluate`: a checkpoint, run, registered version or folder of images -> metrics and report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dfu_mlflow import entry
from dfu_mlflow.config import RunConfig, load
from dfu_mlflow.lean_imports import loading_libraries
from dfu_mlflow.phases import at_work

OPTIONS = {"config": "", "source": "models:/dfu-sampler@challenger", "weights": "best", "fetch-weights": ""}
SHOWN = {"output_dir": "outputs/evaluate"}
"""Defaults that are not the configuration's."""


def main(arguments: Sequence[str]) -> int:
    """Evaluate, or with `--fetch-weights [FOLDER]` list and fetch the weights that metrics can use; 0 when done."""
    options, flags = entry.split(arguments, OPTIONS)
    with loading_libraries():
        from registry.evaluate import EvaluateOptions, evaluate, fetch

    if wanted := options["fetch-weights"]:
        folder = None if wanted == "true" else Path(wanted)
        return 1 if fetch(load(RunConfig, options["config"] or None, flags), folder) else 0
    chosen = load(EvaluateOptions, None, ["--source", options["source"], "--weights", options["weights"]])
    with at_work():
        result = evaluate(chosen, options["config"] or None, flags)
    print("\n".join([*result.sentences, f"report: {result.report}; MLflow run {result.run_id}"]))
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main, settings=RunConfig, options=OPTIONS | SHOWN))
