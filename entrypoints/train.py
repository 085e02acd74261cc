"""`mlflow run . -e train`: data -> fine-tuning -> evaluation of each epoch -> registered candidate."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dfu_mlflow import entry
from dfu_mlflow.config import RunConfig, load


def main(arguments: Sequence[str]) -> int:
    """Train, or with `--dry-run` print the configuration and the plan; 0 when done."""
    options, flags = entry.split(arguments, {"config": "tiny", "dry-run": "false"})
    config = load(RunConfig, options["config"], flags)
    # Loaded after the configuration is known to be right: torch and diffusers take seconds.
    if options["dry-run"] != "false":
        from dfu_mlflow.plan import print_plan

        print_plan(config)
        return 0
    from dfu_mlflow.pipeline import run_training
    from registry.publish import publish

    result = run_training(config, publish=lambda result: publish(result, config))
    if config.registry.promote and config.registry.register_model:
        from registry.promote import promote_run

        print("\n".join(promote_run(result.run_id, config).sentences))
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main))
