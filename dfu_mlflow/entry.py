"""How every entry point ends: one line and an exit code instead of a stack trace for what the user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from dfu_mlflow.errors import Interrupted, UserError

USER_ERROR_CODE = 2
INTERRUPTED_CODE = 130
"""What shells report for a program ended by Ctrl-C (128 + SIGINT)."""


def run(main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Call `main` with the command line and give back the process's exit code.

    Args:
        main: takes the arguments after the program's name, gives back an exit code.
        arguments: None is this process's own command line.

    Returns:
        main's code; 2 after a `UserError`, 130 after `Interrupted` or Ctrl-C, each told on one line of stderr.
        Anything else is a defect and keeps its stack trace.
    """
    try:
        return main(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR_CODE
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"interrupted: {' '.join(str(error).split()) or 'stopped by the user'}", file=sys.stderr)
        return INTERRUPTED_CODE
