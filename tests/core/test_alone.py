"""One process at a time, also where locks are not to be had."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest
from filelock import FileLock

from dfu_mlflow.alone import alone
from dfu_mlflow.errors import UserError


def test_the_second_is_told_what_to_wait_for(tmp_path: Path) -> None:
    lock = tmp_path / "folder" / ".lock"
    with (
        alone(lock, "somebody works here"),
        pytest.raises(UserError, match=r"somebody works here \(it holds .*\.lock\)"),
        alone(lock, "somebody works here"),
    ):
        pass
    with alone(lock, "nobody does any more"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_worked_on_with_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refused)
    with caplog.at_level(logging.WARNING), alone(tmp_path / ".lock", ""):
        pass
    assert "cannot be locked (No locks available)" in caplog.text
