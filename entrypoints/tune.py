"""`mlflow run . -e tune`: a study of trainings or of sampling settings -> best settings, registered best model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dfu_mlflow import entry
from dfu_mlflow.config import RunConfig, load
from dfu_mlflow.lean_imports import loading_libraries
from dfu_mlflow.phases import at_work

OPTIONS = {"config": "tiny"}


def main(arguments: Sequence[str]) -> int:
    """Work on the study and print what it says; 0 when done."""
    options, flags = entry.split(arguments, OPTIONS)
    load(RunConfig, options["config"], flags)
    # Loaded after the configuration is known to be right: torch and diffusers take seconds.
    with loading_libraries():
        from tuning.tune import tune

    with at_work():
        print("\n".join(tune(options["config"], flags)))
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main, settings=RunConfig, options=OPTIONS))
