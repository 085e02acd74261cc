"""`mlflow run . -e serve`: HTTP sampling from the registry."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dfu_mlflow import entry
from dfu_mlflow.config import load
from dfu_mlflow.config.serving import ServeConfig
from dfu_mlflow.lean_imports import loading_libraries

OPTIONS = {"config": ""}


def main(arguments: Sequence[str]) -> int:
    """Serve until told to end; 0 then."""
    options, flags = entry.split(arguments, OPTIONS)
    config = load(ServeConfig, options["config"] or None, flags)
    with loading_libraries():
        from registry.serving.run import serve

    serve(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main, settings=ServeConfig, options=OPTIONS))
