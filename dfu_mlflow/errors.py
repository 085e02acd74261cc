"""Errors meant for the person who typed the command, not for a stack trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Input that cannot be worked with: says what was given, what is allowed and which flag mends it.

    Entry points print it on one line and exit with code 2.

    Args:
        message: for the terminal.
        private: parts of it that may name patients, which nothing that leaves this machine may hold.
    """

    def __init__(self, message: str = "", private: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.private = tuple(filter(None, private))


class ConfigError(UserError):
    """Everything that is wrong with a configuration, found in one pass."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


class Interrupted(Exception):
    """The user or the scheduler asked the run to stop; a checkpoint has been written."""


class Pruned(Interrupted):
    """A tuner ends a run early because it promises less than others."""
