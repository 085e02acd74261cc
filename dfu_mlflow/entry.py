"""How every entry point ends: one line and an exit code instead of a stack trace for what the user can mend."""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path

from pydantic import BaseModel

from dfu_mlflow.config.load import described
from dfu_mlflow.errors import Interrupted, UserError
from dfu_mlflow.lean_imports import keep_bytecode, leave_out_triton
from dfu_mlflow.threading_policy import adapt_waiting

USER_ERROR_CODE = 2
INTERRUPTED_CODE = 130
"""What shells report for a program ended by Ctrl-C (128 + SIGINT)."""
PIPE_CODE = 141
"""The same for SIGPIPE."""
MAX_CHARACTERS = 4000
LAST_WORDS = "DFU_MLFLOW_LAST_WORDS"
"""Environment variable: where the processes of a launcher leave their message and exit code; it shows them once."""


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


def run(
    main: Callable[[Sequence[str]], int],
    arguments: Sequence[str] | None = None,
    settings: type[BaseModel] | None = None,
    options: Mapping[str, str] | None = None,
) -> int:
    """Call `main` with the command line and give back the process's exit code.

    Args:
        main: takes the arguments after the program's name, gives back an exit code.
        arguments: None is this process's own command line.
        settings: what it can be configured by, for `--help`.
        options: its own options and their defaults, for the same; they stand before settings of that name.

    Returns:
        main's code; 2 after a `UserError` or where a file is closed to this user or no folder, 130 after `Interrupted`
        or Ctrl-C, each told on one line of stderr. Anything else is a defect and keeps its stack trace.
    """
    # A clinic's network is closed and its runs are private: MLflow reports usage unless told not to.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one bar for each small file otherwise
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # a new store tells of each of its tables
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # phases say that something is fetched
    keep_bytecode()
    leave_out_triton()
    adapt_waiting()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a pipe, too, lines come when they are printed, and whole
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if {"-h", "--help"} & set(given):
            print(help_text(main, settings, options or {}))
            return 0
        return main(given)
    except UserError as error:
        return _end(USER_ERROR_CODE, f"error: {_line(error)}")
    except (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        return _end(USER_ERROR_CODE, f"error: {error.filename or _line(error)}: {(error.strerror or 'closed').lower()}")
    except BrokenPipeError:
        if not _reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CODE
    except (Interrupted, KeyboardInterrupt) as error:
        return _end(INTERRUPTED_CODE, f"interrupted: {_line(error) or 'stopped by the user'}")
    except Exception:
        if LAST_WORDS in os.environ:
            _end(1, "")
        raise


def help_text(
    main: Callable[[Sequence[str]], int], settings: type[BaseModel] | None, options: Mapping[str, str]
) -> str:
    """What an entry point does, its own options, and every setting with its default."""
    lines = [(sys.modules[main.__module__].__doc__ or "").strip(), "", main.__doc__ or ""]
    if options:
        lines += ["", "Options and their defaults (as -P NAME=VALUE with mlflow run):"]
        lines += [f"  --{name} {value or '(not set)'}" for name, value in options.items()]
    if settings is not None:
        lines += ["", "Settings and their defaults (the same way; units are in dfu_mlflow/config):"]
        lines += [line for line in described(settings) if line.split()[0].removeprefix("--") not in options]
    return "\n".join(lines)


def _reader_left() -> bool:
    """`| head`: whoever read stdout has seen enough. Any other broken pipe is a defect."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _end(code: int, line: str) -> int:
    """Say the line, or leave it to the launcher of this process to be said."""
    folder = os.environ.get(LAST_WORDS)
    if folder is None:
        print(line, file=sys.stderr)
    else:
        words = json.dumps({"code": code, "line": line})
        Path(folder, f"{os.environ['RANK']:>06}.json").write_text(words, encoding="utf-8")
    return code


def _line(error: BaseException) -> str:
    """The message on one line; of an endless one (somebody typed a file's content) beginning and end."""
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS // 2]} … {text[-MAX_CHARACTERS // 2 :]}"
