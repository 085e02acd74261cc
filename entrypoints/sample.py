"""`mlflow run . -e sample`: registered model -> a class-balanced folder of synthetic images with a manifest."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dfu_mlflow import entry
from dfu_mlflow.config import load
from registry.sample import SampleConfig, sample


def main(arguments: Sequence[str]) -> int:
    """Draw and say where the pictures are."""
    options, flags = entry.split(arguments, {"config": ""})
    manifest = sample(load(SampleConfig, options["config"] or None, flags))
    print(f"written: {manifest}")
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main))
