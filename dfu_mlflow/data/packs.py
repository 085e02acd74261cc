"""Packs: files that hold some rows of a cache. Written whole, private to the user, checked row by row when read.

A pack is a safetensors file with one tensor `rows` [n, ...] and, in its header, the key and the checksum of each row.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dfu_mlflow.errors import UserError

SUFFIX = ".safetensors"


def make_private_folder(folder: Path) -> None:
    """Make a folder that only the user can enter, whatever the umask; an existing one is left as it is.

    Raises:
        UserError: where it cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from None


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only the user can read: beside its place, then renamed, so that nobody sees half of it.

    Raises:
        UserError: where it cannot be written, for instance on a full disk; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise storage_error(path, error, len(content)) from None
    finally:
        temporary.unlink(missing_ok=True)


def storage_error(path: Path, error: OSError, size_bytes: int = 0) -> UserError:
    """What to tell the user when the cache's disk refuses."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = f" for {size_bytes / 1e6:.1f} MB" if size_bytes else ""
        return UserError(f"no space left{needed} in {path.parent}: free some, or point --data.cache_dir elsewhere")
    return UserError(f"{path} cannot be written ({error.strerror}): point --data.cache_dir to a folder of yours")


def write_pack(folder: Path, keys: Sequence[str], rows: torch.Tensor) -> Path:
    """Store rows [n, ...] under their keys as a new pack and say where; raises as `write_private` does."""
    rows = rows.detach().cpu().contiguous()
    checksums = [_checksum(key, row) for key, row in zip(keys, rows, strict=True)]
    header = {"keys": json.dumps(list(keys)), "checksums": json.dumps(checksums)}
    path = folder / f"{uuid.uuid4().hex}{SUFFIX}"
    write_private(path, save({"rows": rows}, metadata=header))
    return path


def read_index(path: Path) -> list[str] | None:
    """Keys of the rows in a pack, read from its header alone; None for a damaged or vanished pack."""
    header = _header(path)
    return None if header is None else header[0]


def read_rows(path: Path, wanted: dict[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Rows (key -> position) of a memory-mapped pack; damaged rows are left out."""
    header = _header(path)
    if header is None:
        return
    keys, checksums = header
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            rows = file.get_tensor("rows")
            for key, position in wanted.items():
                if keys[position] == key and _checksum(key, rows[position]) == checksums[position]:
                    yield key, rows[position]
    except (OSError, SafetensorError):
        return


def _header(path: Path) -> tuple[list[str], list[int]] | None:
    """Keys and checksums of a pack. The reader of safetensors refuses a file whose length is not what it announces."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            count = file.get_slice("rows").get_shape()[0]
        keys, checksums = json.loads(metadata["keys"]), json.loads(metadata["checksums"])
    except (OSError, SafetensorError, ValueError, KeyError, IndexError):
        return None
    return (keys, checksums) if len(keys) == len(checksums) == count else None


def _checksum(key: str, row: torch.Tensor) -> int:
    """CRC-32 over key and bytes: guards against damage, not against an adversary, and runs at 1 GB/s or more."""
    content = row.contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(content.data, zlib.crc32(key.encode()))
