"""`mlflow run . -e study`: a factorial of named factors -> what each does, with intervals."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dfu_mlflow import entry
from dfu_mlflow.config import RunConfig
from dfu_mlflow.lean_imports import loading_libraries
from dfu_mlflow.phases import at_work

OPTIONS = {"plan": "seed_claims", "config": "tiny"}
SHOWN = {"output_dir": "outputs/study/PLAN"}
"""Defaults that are not the configuration's."""


def main(arguments: Sequence[str]) -> int:
    """Work on the study and print what it says; 0 when done."""
    options, flags = entry.split(arguments, OPTIONS)
    with loading_libraries():
        from tuning.ablation.study import study

    with at_work():
        print("\n".join(study(options["plan"], options["config"], flags)))
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main, settings=RunConfig, options=OPTIONS | SHOWN))
