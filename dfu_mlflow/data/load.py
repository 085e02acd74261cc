"""From a configuration to records divided by patient, with a report on every file that was looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dfu_mlflow.config.schema import DataConfig
from dfu_mlflow.data.audit import NOTES, Audit, ClassCount, Problem, refuse_bad_data
from dfu_mlflow.data.cache import RowCache, default_cache_dir
from dfu_mlflow.data.cleaning import near_duplicates, usable_records, without_duplicates
from dfu_mlflow.data.inspection import inspect_files
from dfu_mlflow.data.patients import assign_patients, refuse_twins
from dfu_mlflow.data.phantom_folder import render_phantom
from dfu_mlflow.data.sources import Source, find_source
from dfu_mlflow.data.split import split_by_patient
from dfu_mlflow.data.tables import Candidate
from dfu_mlflow.errors import UserError
from dfu_mlflow.phases import phase
from dfu_mlflow.types import Record, Split

PHANTOM = "phantom"
PHANTOM_PATTERN = r"^P(\d+)"


def load_split(config: DataConfig, seed: int) -> tuple[Split, Audit]:
    """Find, check, group and divide the photographs.

    Args:
        config: the data section.
        seed: of the division; the same seed and files always give the same one.

    Returns:
        The records of both sides in path order, and the report.

    Raises:
        UserError: for data that cannot be found, told apart by patient, or divided, or that are too broken.
    """
    config, root = _resolve_root(config)
    source = find_source(config, root)
    candidates = assign_patients(source.candidates, config.group_by)
    refuse_twins((item.label for item in candidates), "classes")
    if config.group_by != "none":  # else patients are names of files
        refuse_twins((str(item.patient) for item in candidates), "patients")
    paths = list(dict.fromkeys(candidate.path for candidate in candidates))
    inspections, problems = inspect_files(paths, config.min_side_px, RowCache(default_cache_dir(config)))
    records, bad_boxes = usable_records(candidates, inspections, config)
    with phase("looking for photographs that are there twice"):
        records, links, repeated = without_duplicates(records, inspections)
        near, look_alike = near_duplicates(records, inspections)
    audit = _audit(source, records, [*source.problems, *problems, *bad_boxes, *repeated, *look_alike])
    refuse_bad_data(audit, config.max_bad_fraction, default_cache_dir(config))
    _refuse_empty_classes(candidates, records)
    split = split_by_patient(records, links | near, config.validation_fraction, seed)
    return split, replace(audit, classes=_class_counts(split))


def _resolve_root(config: DataConfig) -> tuple[DataConfig, Path | None]:
    """The folder to read, rendering the phantom into the cache where that is what was asked for."""
    if config.manifest is not None:
        return config, None if config.root in (None, PHANTOM) else Path(str(config.root))
    if config.root != PHANTOM:
        return config, None if config.root is None else Path(config.root)
    if config.bounding_boxes is not None:
        raise UserError("--data.bounding_boxes needs photographs of yours: set --data.root, which is phantom")
    return config.model_copy(update={"group_by": config.group_by or PHANTOM_PATTERN}), render_phantom(config)


def _audit(source: Source, records: Sequence[Record], problems: Sequence[Problem]) -> Audit:
    used = {record.path for record in records}
    faulty = {problem.path for problem in problems if problem.kind not in NOTES}
    return Audit(
        files=len(source.files),
        left_out_files=len(source.files - used),
        images=len(records),
        boxed_images=sum(record.box is not None for record in records),
        unusable_files=len((source.files & faulty) - used),
        ignored_files=source.ignored_files,
        classes=(),
        patients=len({record.patient for record in records}),
        problems=tuple(sorted(problems, key=lambda problem: (problem.path, problem.kind))),
    )


def _refuse_empty_classes(candidates: Sequence[Candidate], records: Sequence[Record]) -> None:
    empty = sorted({item.label for item in candidates} - {record.label for record in records})
    if empty:
        raise UserError(f"class {', '.join(empty)} has no usable image left: mend its files, or set --data.classes")


def _class_counts(split: Split) -> tuple[ClassCount, ...]:
    def count(records: Sequence[Record], label: str) -> tuple[int, int]:
        chosen = [record for record in records if record.label == label]
        return len(chosen), len({record.patient for record in chosen})

    return tuple(
        ClassCount(label, *count(split.train, label), *count(split.held_out, label)) for label in split.classes
    )
