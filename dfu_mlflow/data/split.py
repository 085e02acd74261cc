"""Training and held-out patients: no patient on both sides, every class on both, shares close to what was asked for."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from dfu_mlflow.errors import UserError
from dfu_mlflow.runtime import derive_seed
from dfu_mlflow.types import Record, Split

STARTS = 24
PATIENT_WEIGHT = 0.1
"""Weight of the share of all patients beside each class's share of images."""
ABSENT = 100.0
"""Cost of a class without a patient on one side: above any sum of squared shares."""

Counts = npt.NDArray[np.float64]


def split_by_patient(records: Sequence[Record], links: Iterable[tuple[str, str]], fraction: float, seed: int) -> Split:
    """Divide records by patient, each class's held-out share of images as close to `fraction` as patients allow.

    Several random divisions are each improved by moving single patients for as long as that helps; the best one wins.
    scikit-learn's StratifiedGroupKFold knows only shares of 1/k, and does not promise every class on both sides.

    Args:
        records: what to divide.
        links: pairs of patients who must stay together, for instance because they share a picture.
        fraction: held-out share, between 0 and 1.
        seed: another seed is another division.

    Raises:
        UserError: for a class whose patients cannot be on both sides.
    """
    groups = _groups(records, links)
    _refuse_lonely_classes(records, groups)
    names, rows = np.unique([groups[record.patient] for record in records], return_inverse=True)
    classes, columns = np.unique([record.label for record in records], return_inverse=True)
    counts = np.zeros((len(names), len(classes)))
    np.add.at(counts, (rows, columns), 1.0)
    held = _choose(counts, fraction, seed)
    absent = [label for label, share in zip(classes, held @ counts / counts.sum(0), strict=True) if share in (0, 1)]
    if absent:
        raise UserError(
            f"no division of the {len(names)} patients puts every class on both sides (class {', '.join(absent)} "
            "fails): add patients, or leave classes out with --data.classes"
        )
    chosen = set(names[held].tolist())
    return Split(
        train=tuple(record for record in records if groups[record.patient] not in chosen),
        held_out=tuple(record for record in records if groups[record.patient] in chosen),
    )


def dataset_digest(split: Split) -> str:
    """32 hexadecimal digits over files, boxes, labels, patients and sides: what a run's figures rest on."""
    lines = [
        f"{side}:{record.digest}:{record.box}:{record.label}:{record.patient}"
        for side, records in (("train", split.train), ("held_out", split.held_out))
        for record in records
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode(errors="surrogateescape")).hexdigest()[:32]


def _groups(records: Sequence[Record], links: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Patient -> name of the group of linked patients it belongs to (the first of them)."""
    parent = {record.patient: record.patient for record in records}

    def root(patient: str) -> str:
        while parent[patient] != patient:
            parent[patient] = parent[parent[patient]]
            patient = parent[patient]
        return patient

    for one, other in links:
        if one in parent and other in parent:
            first, second = sorted((root(one), root(other)))
            parent[second] = first
    return {patient: root(patient) for patient in parent}


def _refuse_lonely_classes(records: Sequence[Record], groups: dict[str, str]) -> None:
    patients: dict[str, set[str]] = defaultdict(set)
    for record in records:
        patients[record.label].add(record.patient)
    for label, members in sorted(patients.items()):
        if len({groups[patient] for patient in members}) > 1:
            continue
        names = ", ".join(sorted(members)[:3])
        found = (
            f"one patient ({names})" if len(members) == 1 else f"{len(members)} patients ({names}) who share pictures"
        )
        raise UserError(
            f"class {label} has {found}, so it cannot be in training and validation both: add patients, leave it out "
            "with --data.classes, or check --data.group_by",
            private=members,
        )


def _choose(counts: Counts, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which groups [G] are held out, given images by group and class [G, C]."""
    shares = np.hstack([counts / counts.sum(0), np.full((len(counts), 1), 1.0 / len(counts))])
    generator = np.random.default_rng(derive_seed(seed, "split"))
    candidates = [_descend(shares, generator.random(len(shares)) < fraction, fraction) for _ in range(STARTS)]
    return min(candidates, key=lambda held: float(_cost(held @ shares, fraction)))


def _descend(shares: Counts, held: npt.NDArray[np.bool_], fraction: float) -> npt.NDArray[np.bool_]:
    """Move the group whose move lowers the cost most, until none does."""
    total = held @ shares
    while True:
        moved = total + np.where(held, -1.0, 1.0)[:, None] * shares
        costs = _cost(moved, fraction)
        best = int(costs.argmin())
        if costs[best] >= _cost(total, fraction) - 1e-12:
            return held
        held = held.copy()
        held[best] = not held[best]
        total = held @ shares


def _cost(totals: Counts, fraction: float) -> Counts:
    """Squared distance of held-out shares [..., C + 1] from the wanted one; a penalty for classes on one side only."""
    weights = np.ones(totals.shape[-1])
    weights[-1] = PATIENT_WEIGHT
    classes = totals[..., :-1]
    absent = (classes < 1e-9) | (classes > 1 - 1e-9)
    return np.asarray(((totals - fraction) ** 2 * weights).sum(-1) + ABSENT * absent.sum(-1))
