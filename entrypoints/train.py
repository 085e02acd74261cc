"""`mlflow run . -e train`: data -> fine-tuning -> evaluation of each epoch -> registered candidate."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dfu_mlflow import entry
from dfu_mlflow.config import RunConfig, load
from dfu_mlflow.launch import NONE, launch_options, run_launcher
from dfu_mlflow.lean_imports import loading_libraries
from dfu_mlflow.phases import at_work

OPTIONS = {"config": "tiny", "dry-run": "false", "launch": NONE, "processes": ""}


def main(arguments: Sequence[str]) -> int:
    """Train, in several processes with `--launch`, or with `--dry-run` print configuration and plan; 0 when done."""
    options, flags = entry.split(arguments, OPTIONS)
    config = load(RunConfig, options["config"], flags)
    # Loaded after the configuration is known to be right: torch and diffusers take seconds.
    if options["dry-run"] != "false":
        from dfu_mlflow.plan import print_plan

        print_plan(config)
        return 0
    launcher = launch_options(options["launch"], options["processes"], config.device)
    if launcher is not None:
        command = [*launcher, "-m", "entrypoints.train", "--config", options["config"], *flags]
        return run_launcher(command, config.device, config.runtime.timeout_s)
    with loading_libraries():
        from dfu_mlflow.pipeline import run_training
        from dfu_mlflow.runtime import release_memory
        from registry.promote import promote_run
        from registry.publish import publish, try_registered

    with at_work():
        registered = []
        result = run_training(config, publish=lambda result: registered.append(publish(result, config)))
        release_memory()  # what follows opens models of its own
        for version in filter(None, registered):  # of the main process alone
            if config.registry.promote:
                print("\n".join(promote_run(result.run_id, config).sentences))
            else:
                try_registered(version, config)
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main, settings=RunConfig, options=OPTIONS))
