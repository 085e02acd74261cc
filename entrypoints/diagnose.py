"""`mlflow run . -e diagnose`: a run, or a fine-tune made elsewhere -> ranked findings and the change that mends
each; several runs -> what the failing ones share."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from dfu_mlflow import entry
from dfu_mlflow.config import RunConfig, load
from dfu_mlflow.errors import UserError
from dfu_mlflow.lean_imports import loading_libraries
from dfu_mlflow.phases import at_work

OPTIONS = {
    **dict.fromkeys(("run", "checkpoint", "images", "embeddings", "curves"), ""),
    **{"weights": "best", "budget": "full", "config": ""},
}
SHARED = dict.fromkeys(("runs", "experiment", "outcome", "failing"), "")
"""Of several runs."""


def main(arguments: Sequence[str]) -> int:
    """Diagnose and say where the findings are; 0 whether or not there are any."""
    shared, rest = entry.split(arguments, SHARED)
    if shared["runs"]:
        return compare([*_given(shared), *rest])
    if unused := _given(shared):
        raise UserError(f"{unused[0]} goes with --runs, for several runs to compare")
    options, flags = entry.split(rest, OPTIONS)
    with loading_libraries():
        from dfu_mlflow.diagnosis.report import print_diagnosis
        from registry.diagnose import run_diagnosis
        from registry.told import DiagnoseOptions

    config = options.pop("config")
    with at_work():
        diagnosis, written = run_diagnosis(load(DiagnoseOptions, None, _given(options)), config or None, flags)
    print_diagnosis(diagnosis)
    print(f"written: {' and '.join(map(str, written))}")
    return 0


def compare(flags: Sequence[str]) -> int:
    """Say what failing runs share and where it was written; 0 whatever it is."""
    with loading_libraries():
        from dfu_mlflow.diagnosis.shared_report import print_comparison
        from registry.compare_runs import CompareOptions, compare_runs

    one, rest = entry.split(flags, {"run": ""})  # `mlflow run` passes it empty
    if one["run"]:
        raise UserError("--run and --runs: give one of them")
    with at_work():
        comparison, written = compare_runs(load(CompareOptions, None, rest))
    print_comparison(comparison)
    print(f"written: {', '.join(map(str, written))}")
    plans = [path for path in written if path.name.startswith("separate_")]
    for plan in plans:
        print(f"next: python -m entrypoints.study --plan {plan} --config {plan.with_name('best_run.yaml')}")
    return 0


def _given(options: Mapping[str, str]) -> list[str]:
    return [part for name, value in options.items() if value for part in (f"--{name}", value)]


if __name__ == "__main__":
    sys.exit(entry.run(main, settings=RunConfig, options={**OPTIONS, **SHARED, "output_dir": "outputs/diagnose"}))
