"""A folder of samples that a killed process leaves usable, and that the same command goes on with.

`sampling.json` says what it was drawn with, `manifest.csv` lists the pictures that are kept, `rejected.csv` those that
were drawn and dropped. Both lists grow after every batch, once its pictures are on the disk.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dfu_mlflow.alone import alone
from dfu_mlflow.errors import UserError

MANIFEST, REJECTED, SETTINGS, LOCK = "manifest.csv", "rejected.csv", "sampling.json", ".sampling.lock"
COLUMNS = (
    "path",
    "class",
    "seed",
    "number",
    "guidance_scale",
    "num_inference_steps",
    "scheduler",
    "model",
    "nearest_similarity",
    "nearest_features",
)
REJECTED_COLUMNS = ("class", "seed", "number", "reason", "explanation")

Row = Mapping[str, object]


class SampleFolder:
    """The folder, opened by one process at a time; use it in a `with` block.

    Args:
        folder: made when missing.
        settings: everything that decides what is drawn.

    Raises:
        UserError: for a folder with other samples, with samples of other settings, or in use.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        check_folder(folder, settings)
        self._alone = alone(folder / LOCK, f"--output_dir {folder} is being filled by another process")
        self._settings = dict(settings)

    def __enter__(self) -> SampleFolder:
        self._alone.__enter__()
        if not (self.folder / SETTINGS).exists():
            _replace(self.folder / SETTINGS, json.dumps(self._settings, indent=1, ensure_ascii=False))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._alone.__exit__(kind, error, trace)

    def decided(self) -> dict[tuple[str, int], bool]:
        """(class, number) of every picture that was drawn -> whether it was kept; half-written lines are forgotten."""
        found: dict[tuple[str, int], bool] = {}
        for file, columns, kept in ((MANIFEST, COLUMNS, True), (REJECTED, REJECTED_COLUMNS, False)):
            for row in _whole_rows(self.folder / file, columns):
                if not kept or (self.folder / row["path"]).is_file():
                    found[row["class"], int(row["number"])] = kept
        return found

    def forget(self, decided: Mapping[tuple[str, int], bool]) -> None:
        """Keep the lines of these pictures alone: what a batch left behind that was cut short is drawn again."""
        for file, columns in ((MANIFEST, COLUMNS), (REJECTED, REJECTED_COLUMNS)):
            rows = _whole_rows(self.folder / file, columns)
            kept = {(row["class"], int(row["number"])): row for row in rows}
            wanted = [row for key, row in kept.items() if key in decided]
            if (self.folder / file).exists():
                _replace(self.folder / file, _lines(columns, wanted, header=True))

    def write(self, pictures: Mapping[str, bytes], kept: Sequence[Row], rejected: Sequence[Row]) -> None:
        """Store a batch: pictures (path below the folder -> bytes) first, then the lines that name them."""
        for path, content in pictures.items():
            target = self.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            _replace(target, content)
        _append(self.folder / REJECTED, REJECTED_COLUMNS, rejected)
        _append(self.folder / MANIFEST, COLUMNS, kept)


def check_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse what cannot be gone on with, before anything is loaded.

    Raises:
        UserError: for a folder with other files, which may be photographs, or with samples of other settings.
    """
    try:
        before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if folder.is_dir() and any(map(_is_content, folder.iterdir())):
            raise UserError(f"--output_dir {folder} holds other files: give an empty folder") from None
        return
    except NotADirectoryError:
        raise UserError(f"--output_dir {folder} is no folder") from None
    except ValueError:
        raise UserError(f"--output_dir {folder}: {SETTINGS} cannot be read; give another folder") from None
    changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if changed:
        said = "; ".join(f"{name} was {before.get(name)}, now {settings.get(name)}" for name in changed)
        raise UserError(f"--output_dir {folder} holds samples of other settings ({said}): give another folder")


def _is_content(item: Path) -> bool:
    """What systems, and a command that was stopped, leave behind is none: `.DS_Store`, `.sampling.lock`."""
    return not item.name.startswith(".") and item.name != "lost+found"


def _whole_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(whole.splitlines()) if None not in row.values() and len(row) == len(columns)]


def _append(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    if not rows and path.exists():
        return
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(_lines(columns, rows, header=path.stat().st_size == 0))
        file.flush()
        os.fsync(file.fileno())


def _lines(columns: Sequence[str], rows: Sequence[Row], header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _replace(path: Path, content: str | bytes) -> None:
    """Written whole beside the old file, then renamed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)
