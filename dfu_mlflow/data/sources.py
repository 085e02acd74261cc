"""Where pictures come from: class folders or a manifest, with or without a table of bounding boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dfu_mlflow.config.prompts import MINIMAL
from dfu_mlflow.config.schema import DataConfig
from dfu_mlflow.data.audit import Problem
from dfu_mlflow.data.tables import Candidate, attach_boxes, read_boxes, read_manifest
from dfu_mlflow.errors import UserError

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".pnm",
    ".jp2", ".avif",
))
CAMERA_SUFFIXES = frozenset((
    ".heic", ".heif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".dcm", ".psd",
))
# fmt: on
"""Photographs that Pillow does not read: reported rather than passed over in silence."""

DEEPEST = 4
PHASES = frozenset(label.casefold() for label in MINIMAL) | {
    *("inflammation", "inflammatory", "proliferation", "proliferative", "remodeling", "remodelling", "maturation"),
}
"""What folders of healing phases are called, in lower case."""


@dataclass(frozen=True)
class Source:
    """What a data set offers, before any file is opened.

    Attributes:
        candidates: pictures with their labels, in path order.
        files: every image file found, also those that cannot be used.
        problems: what was noticed about names and tables.
        ignored_files: how many files are no images by their name.
    """

    candidates: tuple[Candidate, ...]
    files: frozenset[Path]
    problems: tuple[Problem, ...]
    ignored_files: int = 0


def find_source(config: DataConfig, root: Path | None) -> Source:
    """List the pictures of a data set.

    Args:
        config: the data section.
        root: the folder of class folders, or what a manifest's paths are relative to.

    Raises:
        UserError: for a missing or empty folder, a table that lacks columns, or classes that do not occur.
    """
    source = _find(config, root)
    left_out = _left_out(source, config.classes)
    if config.bounding_boxes is not None:
        if any(candidate.box for candidate in source.candidates):
            raise UserError("boxes are given twice, by --data.manifest and by --data.bounding_boxes: leave one out")
        candidates, problems = attach_boxes(source.candidates, read_boxes(config.bounding_boxes))
        source = replace(source, candidates=candidates, problems=source.problems + problems)
    return replace(
        source,
        candidates=tuple(item for item in source.candidates if item.path not in left_out),
        files=source.files - left_out,
        problems=tuple(problem for problem in source.problems if problem.path not in left_out),
    )


def _find(config: DataConfig, root: Path | None) -> Source:
    if config.manifest is not None:
        candidates, problems = read_manifest(config.manifest, root, config.group_by, config.bounding_boxes is None)
        files = frozenset([item.path for item in candidates] + [item.path for item in problems])
        return Source(candidates, files, problems)
    if root is None:
        raise UserError(
            "no photographs were named: set --data.root to a folder with one sub-folder a class, or --data.manifest "
            "to a CSV with columns path, label, patient"
        )
    return _find_folders(root, config.classes)


def _left_out(source: Source, classes: tuple[str, ...] | None) -> frozenset[Path]:
    """Files of the classes that `data.classes` leaves out."""
    if classes is None:
        return frozenset()
    found = {candidate.label for candidate in source.candidates}
    unknown = sorted(set(classes) - found)
    if unknown:
        raise UserError(f"--data.classes names {', '.join(unknown)}, but the data hold {', '.join(sorted(found))}")
    kept = {item.path for item in source.candidates if item.label in classes}
    return frozenset(item.path for item in source.candidates) - kept


def _find_folders(root: Path, classes: tuple[str, ...] | None) -> Source:
    """Read `root/CLASS/*` or `root/MODALITY/CLASS/*`: classes are at the level where most of the pictures lie."""
    if not root.is_dir():
        raise UserError(f"--data.root {root} is not a folder: it must hold one sub-folder a class, or be phantom")
    images: dict[int, list[Path]] = {}
    unreadable, ignored = [], 0
    for depth, path in _walk(root, 0):
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            images.setdefault(depth, []).append(path)
        elif suffix in CAMERA_SUFFIXES:
            unreadable.append(Problem(path, "unsupported format", f"{suffix} must be converted to JPEG or PNG"))
        else:
            ignored += 1
    level = _class_level(images, classes)
    if level is None:
        lost = f": {sum(map(len, images.values()))} images lie elsewhere" if images else ""
        kinds = sorted({problem.path.suffix.lower() for problem in unreadable})
        lost += f"; {len(unreadable)} files ({', '.join(kinds)}) must be converted to JPEG or PNG" if kinds else ""
        raise UserError(f"--data.root {root} holds no images in root/CLASS/ or root/MODALITY/CLASS/{lost}")
    if level == 2 and classes is None:
        _refuse_patients_as_classes(root, images[level])
    candidates = [Candidate(path, path.parent.name, path.relative_to(root).as_posix()) for path in images[level]]
    misplaced = [
        Problem(path, "misplaced", f"lies {'above' if depth < level else 'below'} the class folders")
        for depth, paths in images.items()
        if depth != level
        for path in paths
    ]
    problems = (*unreadable, *misplaced)
    files = frozenset([item.path for item in candidates] + [item.path for item in problems])
    return Source(tuple(candidates), files, problems, ignored)


def _refuse_patients_as_classes(root: Path, images: Sequence[Path]) -> None:
    """Folders that differ from one first folder to the next are no classes of several modalities, nor are those of
    visits below the phases."""
    inner: dict[str, set[str]] = {}
    for path in images:
        inner.setdefault(path.parent.parent.name, set()).add(path.parent.name)
    straight = "put pictures straight into root/CLASS/ (--data.group_by finds patients in file names)"
    if len(inner) > 1 and _phases(inner) == inner.keys() and not any(map(_phases, inner.values())):
        raise UserError(f"--data.root {root}: folders of patients or visits lie in {', '.join(inner)}: {straight}")
    if len({frozenset(names) for names in inner.values()}) > 1:
        raise UserError(
            f"--data.root {root}: are the {len(inner)} folders in it classes, each with folders of patients or visits, "
            f"or do the folders below them name classes? In the one case {straight}, in the other name the classes "
            "with --data.classes"
        )


def _phases(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.casefold() in PHASES}


def _class_level(images: dict[int, list[Path]], classes: tuple[str, ...] | None) -> int | None:
    """1 for `CLASS/*`, 2 for `MODALITY/CLASS/*`; folder names that are configured classes decide first."""
    counts: Counter[int] = Counter()
    for depth in (1, 2):
        paths = images.get(depth, [])
        counts[depth] = sum(path.parent.name in classes for path in paths) if classes else len(paths)
    level, count = counts.most_common(1)[0]
    return level if count else None


def _walk(folder: Path, depth: int) -> Iterator[tuple[int, Path]]:
    """Visible files with the number of folders above them, in path order."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"--data.root: {folder} cannot be listed: {error.strerror}") from None
    for path in paths:
        if path.name.startswith((".", "__MACOSX")):
            continue
        if not path.is_dir():
            yield depth, path
        elif depth < DEEPEST:
            yield from _walk(path, depth + 1)
