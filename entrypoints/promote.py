"""`mlflow run . -e promote`: a registered version becomes the champion, or a sentence says why not.

Exit code 0: it is the champion. 3: the gate refused it. 2: input that cannot be worked with.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dfu_mlflow import entry
from dfu_mlflow.config import RunConfig, load
from dfu_mlflow.lean_imports import loading_libraries
from dfu_mlflow.phases import at_work

OPTIONS = {"config": "", "model": "models:/dfu-sampler@challenger", "rollback": "false"}
SHOWN = {"output_dir": "outputs/promote"}
"""Defaults that are not the configuration's."""


def main(arguments: Sequence[str]) -> int:
    """Promote, or with `--rollback true` go back to the champion before; 0, or 3 for a refusal."""
    options, flags = entry.split(arguments, OPTIONS)
    with loading_libraries():
        from registry.promote import REFUSED_CODE, PromoteOptions, promote

    chosen = load(PromoteOptions, None, ["--model", options["model"], "--rollback", options["rollback"]])
    with at_work():
        outcome = promote(chosen, options["config"] or None, flags)
    print("\n".join(outcome.sentences))
    return 0 if outcome.promoted else REFUSED_CODE


if __name__ == "__main__":
    sys.exit(entry.run(main, settings=RunConfig, options=OPTIONS | SHOWN))
