"""`mlflow run . -e sample`: registered model -> a class-balanced folder of synthetic images with a manifest."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dfu_mlflow import entry
from dfu_mlflow.config import load
from dfu_mlflow.config.sample import SampleConfig
from dfu_mlflow.lean_imports import loading_libraries
from dfu_mlflow.phases import at_work

OPTIONS = {"config": ""}
INCOMPLETE_CODE = 3
"""Exit code where so many pictures were dropped that some are missing."""


def main(arguments: Sequence[str]) -> int:
    """Draw and say where the pictures are; 0, or 3 where some are missing."""
    options, flags = entry.split(arguments, OPTIONS)
    config = load(SampleConfig, options["config"] or None, flags)
    with loading_libraries():
        from registry.sample import sample

    with at_work():
        done = sample(config)
    print("\n".join([*done.sentences, f"written: {done.manifest}"]))
    return 0 if done.complete else INCOMPLETE_CODE


if __name__ == "__main__":
    sys.exit(entry.run(main, settings=SampleConfig, options=OPTIONS))
