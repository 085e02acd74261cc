"""Weights that come from outside: where they are looked for, how they are fetched, and how they are read safely."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from transformers.utils.hub import cached_file

from dfu_mlflow import runtime
from dfu_mlflow.errors import UserError
from dfu_mlflow.phases import phase


@dataclass(frozen=True)
class Unavailable:
    """Why a network cannot be used, for a note."""

    reason: str


@dataclass(frozen=True)
class WeightsFile:
    """One published file.

    Attributes:
        urls: where it is published; the first that answers is taken, and its last part is the file's name.
        sha256: the digits its hash begins with; empty where the publisher states none.
        other_names: what other programs call the same file in torch's hub cache.
    """

    urls: tuple[str, ...]
    sha256: str = ""
    other_names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """File names under which it may lie, the preferred one first."""
        return (*(url.rsplit("/", 1)[-1] for url in self.urls), *self.other_names)

    def find(self, folder: Path) -> Path | None:
        """The file in `folder`, if one with the right hash is there."""
        paths = [folder / name for name in self.names if (folder / name).is_file()]
        return next((path for path in paths if runtime.file_digest(path).startswith(self.sha256)), None)


@dataclass(frozen=True)
class Weights:
    """The weights of one network.

    Attributes:
        name: e.g. `inception`.
        used_for: the metrics that need them.
        flag: the setting that takes a path to them.
        files: one file, or all files of a folder in the hub's layout.
        size_mb: of a download, about.
        path: what the setting holds; comes before every cache.
        repository: the hub's name of a folder of files; empty for a single file.
        automatic: False for files that are code: they are used only where the user names them.
    """

    name: str
    used_for: str
    flag: str
    files: tuple[WeightsFile, ...]
    size_mb: int
    path: Path | None = None
    repository: str = ""
    automatic: bool = True

    def place(self, folder: Path | None = None) -> Path:
        """Where a download puts the file, or the folder of files: below `folder`, or in torch's hub cache."""
        inside = folder or Path(torch.hub.get_dir()) / "checkpoints"
        return inside / (self.repository.replace("/", "--") if self.repository else self.files[0].names[0])

    def find(self) -> Path | None:
        """The configured path, or what a cache holds: torch's hub folder, and the hub's own for a repository."""
        if self.path is not None:
            return self.path
        if not self.automatic:
            return None
        if not self.repository:
            return self.files[0].find(self.place().parent)
        return self.place() if all(file.find(self.place()) for file in self.files) else self._in_hub_cache()

    def _in_hub_cache(self) -> Path | None:
        folders = []
        for file in self.files:
            held = [_hub_cached(self.repository, name) for name in file.names]
            folders.append(next((path.parent for path in held if path is not None), None))
        return folders[0] if len(set(folders)) == 1 else None


def obtain(weights: Weights, allow_download: bool) -> Path | Unavailable:
    """The weights' path: configured, cached, or downloaded where that is allowed."""
    found = weights.find()
    if found is None and allow_download and weights.automatic:
        return fetch(weights)
    if found is None:
        download = " or --metrics.allow_download true" if weights.automatic else ""
        return Unavailable(f"no {weights.name} weights: set {weights.flag}{download}")
    return found


def fetch(weights: Weights, folder: Path | None = None) -> Path | Unavailable:
    """Download what is missing into torch's hub cache, or below `folder`; a partial file is never left behind.

    Returns:
        The file, or the folder of a repository; or what went wrong.
    """
    target = weights.place(folder)
    for file in weights.files:
        inside = target if weights.repository else target.parent
        if file.find(inside) is not None:
            continue
        problems = [_download(url, inside, file.sha256) for url in file.urls if file.find(inside) is None]
        if file.find(inside) is None:
            return Unavailable(f"{weights.name} weights could not be downloaded: {problems[-1]}")
    found = [file.find(target.parent) for file in weights.files]
    return target if weights.repository else found[0] or target


def _download(url: str, folder: Path, sha256: str) -> str:
    """What went wrong, or nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target = str(folder / url.rsplit("/", 1)[-1])
        with phase(f"fetching {url.rsplit('/', 1)[-1]}"):
            torch.hub.download_url_to_file(url, target, hash_prefix=sha256 or None, progress=False)
    except (OSError, RuntimeError, ValueError) as error:
        return f"{url}: {' '.join(str(error).split())}"
    return ""


def _hub_cached(repository: str, name: str) -> Path | None:
    try:
        path = cached_file(repository, name, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(path) if path else None


def is_own(path: Path) -> bool:
    """A plain file of this user's: anybody can leave one in a shared folder, and TorchScript is code."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()


def read_state(path: Path, weights: Weights) -> dict[str, torch.Tensor]:
    """The tensors of a .pth or safetensors file; nothing in it is executed.

    Raises:
        UserError: for a file that is missing or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{weights.name} weights {path} do not exist: mend {weights.flag}") from None
    except Exception as error:  # a file from outside may fail in the unpickler, the zip reader or safetensors
        raise wrong_file(path, weights, type(error).__name__) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise wrong_file(path, weights, "not a table of tensors")
    return dict(state)


def wrong_file(path: Path, weights: Weights, what: str) -> UserError:
    """The error for a file that holds something else."""
    kind = "a folder with" if weights.repository else "the file"
    tail = "" if weights.repository or not weights.automatic else ", or its tensors as safetensors"
    names = " and ".join(file.names[0] for file in weights.files)
    return UserError(f"{path} does not hold {weights.name} weights ({what}): {weights.flag} takes {kind} {names}{tail}")
