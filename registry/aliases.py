"""The champion's alias and how it moves: in an order in which a crash between any two writes changes nothing served.

Writes of a promotion: the version's tags, then `previous`, then `champion`, last. Until that last write the old
champion is served. Of a rollback: `champion` first, for getting rid of it is what matters, then `previous`.

Two promotions: a file lock lets one process at a time look and write, beside the database for SQLite, on this machine
for a server. Under it the champion that the challenger was judged against must still be there. Processes on several
machines that share a server are held apart by that check alone, and by a second look after the write: between the
check and the write lie milliseconds in which two could pass, and the second look then tells the one that lost.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dfu_mlflow.errors import UserError
from registry.clean_process import SQLITE

CHAMPION, PREVIOUS = "champion", "previous"
GATE_TAG = "gate.status"
"""Of a version that was judged."""
REPLACED_TAG = "gate.replaced"
"""On a champion: the version it took the place of, so that going back works after a crash, and more than once."""
TAG_CHARACTERS = 5000


class Overtaken(Exception):
    """Another process moved the champion in between; nothing of ours is served."""


def version_at(name: str, alias: str) -> int | None:
    """The version that an alias names, None where there is no such alias or model."""
    try:
        return int(MlflowClient().get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def write_tags(name: str, version: int, tags: Mapping[str, str]) -> None:
    """Set tags of a version; characters that MLflow refuses become `_`."""
    client = MlflowClient()
    for key, value in tags.items():
        client.set_model_version_tag(name, str(version), re.sub(r"[^/\w.\- :]", "_", key), value[:TAG_CHARACTERS])


def crown(name: str, version: int, expected: int | None, tags: Mapping[str, str]) -> None:
    """Make a version the champion, if the champion is still the one it was judged against.

    Args:
        expected: that champion; None for none.
        tags: written to the version first.

    Raises:
        Overtaken: another process was quicker; judge again.
    """
    client = MlflowClient()
    with registry_lock(name):
        _require(name, expected)
        write_tags(name, version, dict(tags) | ({REPLACED_TAG: str(expected)} if expected else {}))
        if expected is not None:
            client.set_registered_model_alias(name, PREVIOUS, str(expected))
        _require(name, expected)
        client.set_registered_model_alias(name, CHAMPION, str(version))
        _require(name, version)


def roll_back(name: str) -> tuple[int, int]:
    """Make the champion's predecessor the champion again.

    Returns:
        The version that was the champion, and the one that is.

    Raises:
        UserError: where there is no champion, or nothing to go back to.
    """
    client = MlflowClient()
    with registry_lock(name):
        champion = version_at(name, CHAMPION)
        if champion is None:
            raise UserError(f"--rollback: {name} has no champion")
        target = _predecessor(name, champion)
        if target is None:
            raise UserError(f"--rollback: {name} version {champion} is the first champion, nothing was there before")
        write_tags(name, champion, {GATE_TAG: "rolled back"})
        client.set_registered_model_alias(name, CHAMPION, str(target))
        before = _replaced(name, target)
        if before is None:
            client.delete_registered_model_alias(name, PREVIOUS)
        else:
            client.set_registered_model_alias(name, PREVIOUS, str(before))
        _require(name, target)
    return champion, target


@contextmanager
def registry_lock(name: str) -> Iterator[None]:
    """One process at a time moves aliases of a model; the system frees the lock of a process that dies."""
    with FileLock(_lock_file(mlflow.get_registry_uri(), name), mode=0o666):  # other users' processes wait there too
        yield


def _lock_file(uri: str, name: str) -> Path:
    digest = hashlib.sha256(f"{uri}:{name}".encode()).hexdigest()[:16]
    if uri.startswith(SQLITE):
        database = Path(uri.removeprefix(SQLITE)).resolve()
        return database.with_name(f"{database.name}.{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock")
    return Path(tempfile.gettempdir()) / f"dfu-mlflow-registry-{digest}.lock"


def _require(name: str, expected: int | None) -> None:
    found = version_at(name, CHAMPION)
    if found != expected:
        raise Overtaken(f"{name}@{CHAMPION} is version {found}, it was version {expected}")


def _predecessor(name: str, champion: int) -> int | None:
    """`previous`; where a promotion died before its last write that is the champion itself, and its tag knows."""
    previous = version_at(name, PREVIOUS)
    return _replaced(name, champion) if previous in (None, champion) else previous


def _replaced(name: str, version: int) -> int | None:
    tag = MlflowClient().get_model_version(name, str(version)).tags.get(REPLACED_TAG)
    return None if tag is None else int(tag)
