"""The weight files of a base: which they are, what identifies them, and their tensors one after the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dfu_mlflow.phases import phase
from dfu_mlflow.runtime import file_digest

GROUP_BYTES = 256 * 2**20
"""Of a file's tensors that are mapped into memory at a time: pages that were read count until the file is closed."""
STEMS = ("diffusion_pytorch_model", "model")
"""How diffusers and transformers name weight files, without their endings."""
HASHED_AT_ONCE = 64 * 2**20
SLOW_BYTES = 2**28
"""A file above this size takes long enough to hash for the digest to be remembered."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one network in diffusers' or transformers' layout, in the order of their names.

    Raises:
        FileNotFoundError: where the folder holds none.
    """
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [folder / name for name in sorted(names)]
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    raise FileNotFoundError(f"{folder} holds no safetensors weights ({', '.join(f'{s}.safetensors' for s in STEMS)})")


def read_tensors_in_turn(file: Path, wanted: Sequence[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of a safetensors file, in the order they lie there; at most `GROUP_BYTES` are in memory.

    Args:
        wanted: names to read; None reads all.

    A tensor is valid until the next one is asked for: its memory belongs to the file.
    """
    with safe_open(file, framework="pt") as content:
        names = [name for name in content.offset_keys() if wanted is None or name in set(wanted)]
        sizes = [_bytes(content.get_slice(name)) for name in names]
    start = 0
    while start < len(names):
        end, size = start + 1, sizes[start]
        while end < len(names) and size + sizes[end] <= GROUP_BYTES:
            size += sizes[end]
            end += 1
        with safe_open(file, framework="pt") as content:
            for name in names[start:end]:
                yield name, content.get_tensor(name)
        start = end


class TensorReader:
    """Reads tensors of weight files by name; raises `KeyError` for a name that none of them has."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._places: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118
                    self._places[name] = file
                    self._shapes[name] = tuple(content.get_slice(name).get_shape())

    def names(self) -> set[str]:
        """All of them."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        """A tensor of its own memory; the file is closed again, or pages of it that were read would stay."""
        with safe_open(self._places[name], framework="pt") as content:
            tensor: torch.Tensor = content.get_tensor(name)
            return tensor.clone()


def tensor_names(file: Path) -> list[str]:
    """The names in a safetensors file."""
    with safe_open(file, framework="pt") as content:
        return list(content.keys())


class FileDigests:
    """SHA-256 of weight files, remembered by path, size and time of change.

    Args:
        folder: where digests of large files are kept between processes; None keeps them in this process alone.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._known: dict[str, str] = {}

    def of(self, files: Sequence[Path]) -> str:
        """Of one file its own digest, as `sha256sum` prints it; of several the digest of their names and digests."""
        if len(files) == 1:
            return self._one(files[0])
        listed = "\n".join(f"{self._one(file)}  {file.name}" for file in sorted(files, key=lambda file: file.name))
        return hashlib.sha256(listed.encode()).hexdigest()

    def _one(self, file: Path) -> str:
        path = file.resolve()
        state = path.stat()
        stamp = f"{path}:{state.st_size}:{state.st_mtime_ns}:{state.st_ctime_ns}"
        if stamp not in self._known:
            remembered = self._remembered(stamp)
            self._known[stamp] = remembered or _digest(path, state.st_size)
            if remembered is None and state.st_size > SLOW_BYTES:
                self._remember(stamp, self._known[stamp])
        return self._known[stamp]

    def _place(self, stamp: str) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / "weights" / f"{hashlib.sha256(stamp.encode()).hexdigest()}.json"

    def _remembered(self, stamp: str) -> str | None:
        place = self._place(stamp)
        try:
            content = json.loads(place.read_text(encoding="utf-8")) if place is not None else {}
        except (OSError, ValueError):
            return None
        return str(content["sha256"]) if isinstance(content, dict) and content.get("file") == stamp else None

    def _remember(self, stamp: str, digest: str) -> None:
        """Written beside and renamed: processes may share the folder. A folder that is closed is done without."""
        place = self._place(stamp)
        if place is None:
            return
        try:
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            beside = place.with_name(f".{place.name}.{id(self)}")
            beside.write_text(json.dumps({"file": stamp, "sha256": digest}), encoding="utf-8")
            beside.replace(place)
        except OSError:
            return


def _digest(path: Path, size: int) -> str:
    if size <= SLOW_BYTES:
        return file_digest(path)
    digest = hashlib.sha256()
    with path.open("rb") as file, phase(f"hashing {path.parent.name}/{path.name}", size >> 20, "MiB") as progress:
        while block := file.read(HASHED_AT_ONCE):
            digest.update(block)
            progress.advance(len(block) >> 20)
    return digest.hexdigest()


def _bytes(part: Any) -> int:
    count = 1
    for length in part.get_shape():
        count *= int(length)
    return count * (8 if "64" in part.get_dtype() else 4)
