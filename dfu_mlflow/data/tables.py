"""The two tables that describe pictures: a manifest, and a list of bounding boxes."""

from __future__ import annotations

import codecs
import csv
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from dfu_mlflow.data.audit import Problem
from dfu_mlflow.errors import UserError
from dfu_mlflow.types import Box

BOX_COLUMNS = ("xmin", "ymin", "xmax", "ymax")
OTHER_BOXES = (
    {"x", "y", "width", "height"},
    {"x", "y", "w", "h"},
    {"x1", "y1", "x2", "y2"},
    {"left", "top", "right", "bottom"},
    {"minx", "miny", "maxx", "maxy"},
)
"""Columns of boxes written otherwise."""
NOBODY = frozenset({"", "na", "n/a", "nan", "none", "null"})
"""What programs write where a patient is not known."""
DELIMITERS = ",;\t"

Row = dict[str, str]


@dataclass(frozen=True)
class Candidate:
    """A picture that a data set offers, not yet opened.

    Attributes:
        path: the image file.
        label: its class.
        name: how the data set calls it: the path below the root, or as the manifest writes it.
        patient: whom it shows, where a table says so.
        box: as written, not yet clipped to the picture.
    """

    path: Path
    label: str
    name: str
    patient: str | None = None
    box: Box | None = None


@dataclass(frozen=True)
class BoxTable:
    """Boxes by file name (lower case, `/` between folders), and rows that could not be read."""

    path: Path
    boxes: dict[str, tuple[Box, ...]]
    problems: tuple[Problem, ...]


def read_manifest(
    path: Path, root: Path | None, group_by: str | None, boxes: bool = True
) -> tuple[tuple[Candidate, ...], tuple[Problem, ...]]:
    """Read a CSV with columns path, label, optionally patient and xmin, ymin, xmax, ymax; upper or lower case.

    Relative paths start at `root`, or at the manifest's own folder where that is None. The patient is taken from the
    column that `group_by` names (`column:NAME`), or from `patient` where `group_by` is None. Without `boxes`, for
    these come from elsewhere, their columns are left aside.

    Raises:
        UserError: for a file that cannot be read, lacks columns or rows, or rows without a patient.
    """
    rows = _read_rows(path, ("path", "label"), "--data.manifest", _patient_name(group_by))
    column = _patient_column(path, rows[0], group_by)
    with_boxes = boxes and _has_boxes(path, rows)
    candidates: list[Candidate] = []
    problems: list[Problem] = []
    nameless: list[str] = []
    for row in rows:
        file = (root or path.parent) / row["path"].replace("\\", "/")
        if row["label"].lower() in ("", "nan"):
            problems.append(Problem(file, "no label", "the manifest leaves its label empty"))
            continue
        if column is not None and row[column].lower() in NOBODY:
            nameless.append(row["path"])
        try:
            box = _box(row) if with_boxes and any(row[name] for name in BOX_COLUMNS) else None
        except ValueError as error:
            problems.append(Problem(file, "bad bounding box", str(error)))
            continue
        patient = row[column] if column is not None else None
        candidates.append(Candidate(file, row["label"], row["path"], patient, box))
    if nameless:
        raise UserError(
            f"--data.manifest {path}: column {column} names nobody for {_some(nameless)}: write any name that no "
            "other patient has"
        )
    return tuple(sorted(candidates, key=lambda item: (item.path, item.box or ()))), tuple(problems)


def read_boxes(path: Path) -> BoxTable:
    """Read a CSV with columns Filename, Xmin, Ymin, Xmax, Ymax (pixels of the upright picture); others are ignored.

    Raises:
        UserError: for a file that cannot be read or lacks columns or rows.
    """
    boxes: dict[str, list[Box]] = defaultdict(list)
    problems: list[Problem] = []
    rows = _read_rows(path, ("filename", *BOX_COLUMNS), "--data.bounding_boxes")
    _refuse_shares(path, rows)
    for row in rows:
        try:
            boxes[_normal(row["filename"])].append(_box(row))
        except ValueError as error:
            problems.append(Problem(Path(row["filename"]), "bad bounding box", str(error)))
    return BoxTable(path, {name: tuple(found) for name, found in boxes.items()}, tuple(problems))


def _has_boxes(path: Path, rows: Sequence[Row]) -> bool:
    """Whether the manifest's rows carry boxes.

    Raises:
        UserError: for a part of the columns, or boxes written in another way: the pictures would be used whole.
    """
    columns = {_plain(name) for name in rows[0]}
    missing = [name for name in BOX_COLUMNS if name not in rows[0]]
    if not missing:
        _refuse_shares(path, rows)
        return True
    if len(missing) < len(BOX_COLUMNS) or any(other <= columns for other in OTHER_BOXES):
        raise UserError(
            f"{path} lacks the column {', '.join(missing)}: boxes are xmin, ymin, xmax, ymax in pixels, and it has "
            f"{', '.join(rows[0])}"
        )
    return False


def _refuse_shares(path: Path, rows: Sequence[Row]) -> None:
    """Boxes as annotation tools write them for networks would be a pixel wide."""
    cells = [row[name].replace(",", ".") for row in rows for name in BOX_COLUMNS]
    corners = [float(cell) for cell in cells if cell.replace(".", "", 1).isdecimal()]
    if corners and max(corners) <= 1:
        raise UserError(f"{path}: all corners lie between 0 and 1, shares of the picture: give pixels")


def attach_boxes(candidates: Sequence[Candidate], table: BoxTable) -> tuple[tuple[Candidate, ...], tuple[Problem, ...]]:
    """One candidate for each box; pictures without a box are left out and reported.

    A row matches the pictures whose path ends in its file name, folders included where it has them. Where rows are
    left over that match none, the names probably do not agree: pictures without a box then count as unusable.

    Raises:
        UserError: where no row matches any picture.
    """
    boxed: list[Candidate] = []
    bare: list[Candidate] = []
    used: defaultdict[str, set[Path]] = defaultdict(set)
    for candidate in candidates:
        name = next((name for name in _endings(candidate.path) if name in table.boxes), None)
        if name is None:
            bare.append(candidate)
            continue
        used[name].add(candidate.path)
        boxed += [replace(candidate, box=box) for box in table.boxes[name]]
    if not boxed:
        raise UserError(
            f"--data.bounding_boxes {table.path}: no Filename matches a picture: it names "
            f"{_some(list(table.boxes))}; pictures are {_some([item.path.name for item in bare])}"
        )
    unmatched = sorted(set(table.boxes) - set(used))
    problems = list(table.problems)
    for candidate in bare:
        if unmatched:
            reason = f"not named in {table.path.name}, where {len(unmatched)} names fit no picture"
            problems.append(Problem(candidate.path, "bad bounding box", reason))
        else:
            problems.append(Problem(candidate.path, "no bounding box", f"not named in {table.path.name}"))
    problems += [Problem(Path(name), "box without image", "no such picture") for name in unmatched]
    for name, paths in used.items():
        if len(paths) > 1:
            problems.append(Problem(Path(name), "shared file name", f"its boxes go to {len(paths)} pictures"))
    return tuple(boxed), tuple(problems)


def _read_rows(path: Path, required: Sequence[str], flag: str, patient: str = "patient") -> list[Row]:
    """Rows with lower-case column names; comma, semicolon or tab between them, as spreadsheets of all lands write."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8: save it as CSV UTF-8"
        raise UserError(f"{flag} {path} cannot be read: {reason}") from None
    header = text.partition("\n")[0]
    try:
        table = list(csv.reader(text.splitlines(), delimiter=max(DELIMITERS, key=header.count)))
    except csv.Error as error:
        raise UserError(f"{flag} {path} is no CSV: {error}") from None
    columns = [_column(name) for name in table[0]] if table else []
    twice = sorted(name for name in {*required, *BOX_COLUMNS, patient} if columns.count(name) > 1)
    if twice:
        raise UserError(f"{flag} {path} has the column {', '.join(twice)} more than once")
    missing = [column for column in required if column not in columns]
    if missing:
        raise UserError(f"{flag} {path} lacks the column {', '.join(missing)}: it has {', '.join(columns) or 'none'}")
    rows = [
        dict(zip(columns, [cell.strip() for cell in cells] + [""] * len(columns), strict=False)) for cells in table[1:]
    ]
    rows = [row for row in rows if any(row.values())]
    if not rows:
        raise UserError(f"{flag} {path} has no rows")
    return rows


def _column(name: str) -> str:
    """Lower case; `x_min`, `X min` and `bbox_xmin` are `xmin`."""
    name = name.strip().lower()
    return _plain(name) if _plain(name) in BOX_COLUMNS else name


def _plain(name: str) -> str:
    return re.sub(r"^b?box|[ _-]", "", name)


def _patient_name(group_by: str | None) -> str:
    return (group_by or "").removeprefix("column:").strip().lower() or "patient"


def _patient_column(path: Path, row: Row, group_by: str | None) -> str | None:
    column = _patient_name(group_by)
    if group_by is None:
        return column if column in row else None
    if not group_by.startswith("column:"):
        return None
    if column not in row:
        raise UserError(f"--data.group_by {group_by}: {path} has the columns {', '.join(row)}")
    return column


def _box(row: Row) -> Box:
    """Whole pixels that cover the box.

    Raises:
        ValueError: where a corner is not a number.
    """
    try:
        xmin, ymin, xmax, ymax = (float(row[name].replace(",", ".")) for name in BOX_COLUMNS)
        return (math.floor(xmin), math.floor(ymin), math.ceil(xmax), math.ceil(ymax))
    except (ValueError, OverflowError):
        raise ValueError(f"corners are {', '.join(row[name] or 'empty' for name in BOX_COLUMNS)}") from None


def _normal(name: str) -> str:
    return name.replace("\\", "/").strip("/").lower()


def _endings(path: Path) -> list[str]:
    """`a/b/c.png` -> a/b/c.png, b/c.png, c.png: the longest first."""
    parts = PurePosixPath(_normal(path.as_posix())).parts
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
