"""How every entry point ends: one line and an exit code instead of a stack trace for what the user can mend."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from dfu_mlflow.errors import Interrupted, UserError

USER_ERROR_CODE = 2
INTERRUPTED_CODE = 130
"""What shells report for a program ended by Ctrl-C (128 + SIGINT)."""
MAX_CHARACTERS = 4000


def split(arguments: Sequence[str], options: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Take an entry point's own options out of a command line; the rest are flags of the configuration.

    Args:
        arguments: as typed: `--name value`, `--name=value`, or `--name` alone, which means true.
        options: name -> default.

    Returns:
        The options with their values, and the other arguments in their order.
    """
    values, rest = dict(options), list(arguments)
    for name in options:
        for position, argument in enumerate(rest):
            if argument.split("=", 1)[0] != f"--{name}":
                continue
            following = rest[position + 1 : position + 2]
            if "=" in argument:
                values[name], used = argument.split("=", 1)[1], 1
            elif following and not following[0].startswith("--"):
                values[name], used = following[0], 2
            else:
                values[name], used = "true", 1
            del rest[position : position + used]
            break
    return values, rest


def run(main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Call `main` with the command line and give back the process's exit code.

    Args:
        main: takes the arguments after the program's name, gives back an exit code.
        arguments: None is this process's own command line.

    Returns:
        main's code; 2 after a `UserError`, 130 after `Interrupted` or Ctrl-C, each told on one line of stderr.
        Anything else is a defect and keeps its stack trace.
    """
    # A clinic's network is closed and its runs are private: MLflow reports usage unless told not to.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one bar for each small file otherwise
    try:
        return main(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"error: {_line(error)}", file=sys.stderr)
        return USER_ERROR_CODE
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"interrupted: {_line(error) or 'stopped by the user'}", file=sys.stderr)
        return INTERRUPTED_CODE


def _line(error: BaseException) -> str:
    """The message on one line; of an endless one (somebody typed a file's content) beginning and end."""
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS // 2]} … {text[-MAX_CHARACTERS // 2 :]}"
