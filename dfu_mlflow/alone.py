"""One process at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dfu_mlflow.errors import UserError

logger = logging.getLogger(__name__)


@contextmanager
def alone(file: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock file inside the block; the system frees it when its process dies.

    On a file system without locks of that kind the file itself is the lock, or, where that fails too, there is none,
    and a warning says so.

    Args:
        file: made when missing, as is its folder.
        otherwise: what to say while another process holds it.

    Raises:
        UserError: with `otherwise` and the file's name.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{otherwise} (it holds {file})") from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): see that no other process works there", file, error.strerror)
    try:
        yield
    finally:
        lock.release()
