"""`mlflow run . -e diagnose`: a run, or a fine-tune made elsewhere -> ranked findings and the change that mends
each."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dfu_mlflow import entry
from dfu_mlflow.config import load


def main(arguments: Sequence[str]) -> int:
    """Diagnose and say where the findings are; 0 whether or not there are any."""
    names = {"run": "", "checkpoint": "", "images": "", "embeddings": "", "curves": ""}
    options, flags = entry.split(arguments, {**names, "weights": "best", "budget": "full", "config": ""})
    from dfu_mlflow.diagnosis.report import print_diagnosis
    from registry.diagnose import DiagnoseOptions, run_diagnosis

    config = options.pop("config")
    given = [part for name, value in options.items() if value for part in (f"--{name}", value)]
    diagnosis, folder = run_diagnosis(load(DiagnoseOptions, None, given), config or None, flags)
    print_diagnosis(diagnosis)
    print(f"written: {folder / 'findings.json'} and {folder / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main))
