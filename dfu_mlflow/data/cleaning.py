"""Candidates and what their files hold -> records fit to learn from, and the reasons for leaving others out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from dfu_mlflow.config.schema import DataConfig
from dfu_mlflow.data.audit import Problem
from dfu_mlflow.data.inspection import Inspection, near_pairs
from dfu_mlflow.data.tables import Candidate
from dfu_mlflow.types import Box, Record

Inspections = Mapping[Path, Inspection]
LEAST_BOX_PX = 8
Links = set[tuple[str, str]]
"""Pairs of patients who must stay on one side of the split."""


def usable_records(
    candidates: Sequence[Candidate], inspections: Inspections, config: DataConfig
) -> tuple[list[Record], list[Problem]]:
    """Records of the files that could be decoded, with boxes clipped to the picture."""
    records: list[Record] = []
    problems: list[Problem] = []
    for item in candidates:
        inspection = inspections.get(item.path)
        if inspection is None:
            continue
        box, problem = _clip(item, inspection.size_px, config)
        if problem is not None:
            problems.append(problem)
        if box is not None or item.box is None:
            patient = str(item.patient)
            records.append(Record(item.path, item.label, patient, inspection.digest, inspection.size_px, box))
    return records, problems


def without_duplicates(
    records: Sequence[Record], inspections: Inspections
) -> tuple[list[Record], Links, list[Problem]]:
    """Of files with equal pixels keep the first in path order; none of them where their labels differ.

    Patients who share a picture are linked: they may be one person, so they stay on one side.
    """
    same: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        same[inspections[record.path].pixel_digest].append(record)
    kept: set[int] = set()
    links: Links = set()
    problems: list[Problem] = []
    for copies in same.values():
        first = copies[0]
        links |= {(first.patient, other.patient) for other in copies if other.patient != first.patient}
        labels = _contradiction(copies)
        if labels:
            reason = f"the same picture is in the classes {', '.join(labels)}"
            problems += [Problem(path, "mislabelled", reason) for path in dict.fromkeys(item.path for item in copies)]
            continue
        unique = {record.box: record for record in reversed(copies) if record.path == first.path}
        kept |= {id(record) for record in unique.values()}
        others = {record.path: record for record in copies if id(record) not in kept}
        problems += [Problem(other.path, "duplicate", _same_as(first, other)) for other in others.values()]
    return [record for record in records if id(record) in kept], links, problems


def _contradiction(copies: Sequence[Record]) -> list[str]:
    """Labels that records of one picture disagree on; several wounds of one file may well differ."""
    by_box: dict[Box | None, set[str]] = defaultdict(set)
    by_file: dict[Path, set[str]] = defaultdict(set)
    for record in copies:
        by_box[record.box].add(record.label)
        by_file[record.path].add(record.label)
    labels = sorted(set().union(*by_file.values()))
    agreed = all(len(found) == 1 for found in by_box.values()) and len({*map(frozenset, by_file.values())}) == 1
    return [] if agreed else labels


def near_duplicates(records: Sequence[Record], inspections: Inspections) -> tuple[Links, list[Problem]]:
    """Link patients with pictures that look alike; the pictures stay, with a remark on the later one of each pair."""
    by_file = {record.path: record for record in records}
    files = list(by_file.values())
    if not files:
        return set(), []
    hashes = [inspections[record.path].hashes for record in files]
    links: Links = set()
    partners: dict[int, int] = {}
    for one, other in near_pairs(hashes, [record.patient for record in files]):
        links.add((files[one].patient, files[other].patient))
        partners.setdefault(other, one)
    problems = [
        Problem(files[other].path, "near-duplicate", f"looks like {_told_apart(files[one], files[other])}")
        for other, one in partners.items()
    ]
    return links, problems


def _clip(item: Candidate, size_px: tuple[int, int], config: DataConfig) -> tuple[Box | None, Problem | None]:
    if item.box is None:
        return None, None
    (width, height), (xmin, ymin, xmax, ymax) = size_px, item.box
    box = (max(xmin, 0), max(ymin, 0), min(xmax, width), min(ymax, height))
    if box[0] >= box[2] or box[1] >= box[3]:
        where = "is empty" if xmin >= xmax or ymin >= ymax else f"lies outside {width}x{height}"
        return None, Problem(item.path, "bad bounding box", f"{item.box} {where}")
    longer = max(box[2] - box[0], box[3] - box[1])
    if longer < LEAST_BOX_PX:
        return None, Problem(item.path, "bad bounding box", f"{longer} px across show nothing")
    if box != item.box:
        return box, Problem(item.path, "clipped box", f"{item.box} reaches outside {width}x{height}")
    if longer * (1 + 2 * config.box_margin_max) < config.min_side_px:
        reason = f"{longer} px, with its margin below --data.min_side_px {config.min_side_px}"
        return box, Problem(item.path, "small box", reason)
    return box, None


def _same_as(first: Record, other: Record) -> str:
    if other.path == first.path:
        return "listed twice"
    return f"same pixels as {_told_apart(first, other)}"


def _told_apart(first: Record, other: Record) -> str:
    """The first record's file name, or its path where names are equal, and its patient where that differs."""
    name = first.path.name if first.path.name != other.path.name else str(first.path)
    known = first.patient != other.patient and first.path.name not in first.patient
    return f"{name} of patient {first.patient}" if known else name
