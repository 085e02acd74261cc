"""Who is on a picture."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace

from dfu_mlflow.data.tables import Candidate
from dfu_mlflow.errors import UserError

EXAMPLES = 3


def refuse_twins(names: Iterable[str], what: str) -> None:
    """Names that differ in case or in how accents are written are one name, typed twice.

    Raises:
        UserError: naming two of them.
    """
    seen: dict[str, str] = {}
    for name in names:
        first = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if first != name:
            raise UserError(f"{what} {first} and {name}: are they one? Write them alike, or apart")


def assign_patients(candidates: Sequence[Candidate], group_by: str | None) -> tuple[Candidate, ...]:
    """Fill in the patient of every candidate.

    Args:
        candidates: pictures; those of a manifest may name their patients already.
        group_by: a pattern with one group over the file name, `column:NAME` (the manifest's reader has used it),
            `none` (every file its own patient), or None where the manifest's column `patient` says it.

    Raises:
        UserError: where patients cannot be told, for a pattern that is not one or that does not fit every name.
    """
    if group_by == "none":
        return tuple(replace(candidate, patient=candidate.name) for candidate in candidates)
    if group_by is None or group_by.startswith("column:"):
        if any(candidate.patient is None for candidate in candidates):
            raise UserError(_explanation(candidates))
        return tuple(candidates)
    pattern = _compile(group_by)
    patients = [_patient(pattern, candidate.path.name) for candidate in candidates]
    names = _names([item for item, patient in zip(candidates, patients, strict=True) if patient is None])
    if names:
        total = len(_names(candidates))
        raise UserError(
            f"--data.group_by {group_by} fits {total - len(names)} of {total} file names, "
            f"but not {', '.join(names[:EXAMPLES])}: it must find the patient in each"
        )
    return tuple(replace(item, patient=patient) for item, patient in zip(candidates, patients, strict=True))


def _patient(pattern: re.Pattern[str], name: str) -> str | None:
    match = pattern.search(name)
    return (match.group(1) or None) if match else None


def _compile(group_by: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise UserError(f"--data.group_by {group_by} is no valid pattern: {error}") from None
    if pattern.groups != 1:
        raise UserError(
            f"--data.group_by {group_by} has {pattern.groups} groups: put parentheses around the patient, nothing else"
        )
    return pattern


def _names(candidates: Sequence[Candidate]) -> list[str]:
    """Distinct file names in order; a picture with several boxes counts once."""
    return list(dict.fromkeys(candidate.path.name for candidate in candidates))


def _explanation(candidates: Sequence[Candidate]) -> str:
    names = ", ".join(_names(candidates)[:EXAMPLES])
    return (
        f"patients cannot be told from {names}, and pictures of one patient must not be in training and validation "
        "both: set --data.group_by to a pattern with one group over the file name ('P(\\d{3})' finds patient 003 in "
        "280_P003011BDLW.png), to column:patient with --data.manifest, or to none, which takes every image for a "
        "patient of its own: if that is not true, validation figures come out too good"
    )
