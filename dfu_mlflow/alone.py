"""One process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dfu_mlflow.errors import UserError


@contextmanager
def alone(file: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock file inside the block; the system frees it when its process dies.

    Args:
        file: made when missing, as is its folder.
        otherwise: what to say while another process holds it.

    Raises:
        UserError: with `otherwise`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(otherwise) from None
    try:
        yield
    finally:
        lock.release()
