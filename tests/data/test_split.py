"""Division by patient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from dfu_mlflow.data import dataset_digest
from dfu_mlflow.data.split import split_by_patient
from dfu_mlflow.errors import UserError
from dfu_mlflow.types import Record, Split


def random_records(seed: int) -> list[Record]:
    """8-60 patients, one to nine pictures each, several classes over their visits; rare classes are rare."""
    generator = np.random.default_rng(seed)
    records = []
    for patient in range(int(generator.integers(8, 60))):
        for _ in range(int(generator.integers(1, 10))):
            label = "IPR"[generator.choice(3, p=[0.3, 0.58, 0.12])]
            records.append(record(f"P{patient:03d}", label, len(records)))
    return records


def record(patient: str, label: str, number: int) -> Record:
    return Record(Path(f"{number}.png"), label, patient, f"{number:064x}", (64, 64))


def shares(split: Split) -> dict[str, float]:
    held = [item.label for item in split.held_out]
    every = held + [item.label for item in split.train]
    return {label: held.count(label) / every.count(label) for label in split.classes}


@pytest.mark.parametrize("seed", range(50))
def test_no_patient_is_shared_and_every_class_is_on_both_sides(seed: int) -> None:
    records = random_records(seed)
    split = split_by_patient(records, [], 0.25, seed)
    train, held_out = ({item.patient for item in side} for side in (split.train, split.held_out))
    assert not train & held_out
    assert sorted(map(repr, split.train + split.held_out)) == sorted(map(repr, records))
    assert {item.label for item in split.train} == {item.label for item in split.held_out} == set(split.classes)
    assert split == split_by_patient(records, [], 0.25, seed)


def test_shares_are_closer_than_those_of_scikit_learn() -> None:
    ours, theirs = [], []
    for seed in range(12):
        records = random_records(seed)
        labels = np.array([item.label for item in records])
        groups = np.array([item.patient for item in records])
        folds = StratifiedGroupKFold(4, shuffle=True, random_state=seed).split(labels, labels, groups)
        _, test = next(iter(folds))
        theirs.append(max(abs((labels[test] == name).sum() / (labels == name).sum() - 0.25) for name in "IPR"))
        ours.append(max(abs(share - 0.25) for share in shares(split_by_patient(records, [], 0.25, seed)).values()))
    assert np.mean(ours) < 0.5 * np.mean(theirs)
    assert np.median(ours) < 0.02


@pytest.mark.parametrize("fraction", [0.1, 0.33, 0.5])
def test_fraction_is_met(fraction: float) -> None:
    split = split_by_patient([item for seed in (1, 2) for item in random_records(seed)], [], fraction, 0)
    assert all(abs(share - fraction) < 0.04 for share in shares(split).values())


def test_seeds_give_different_divisions() -> None:
    records = random_records(3)
    assert len({dataset_digest(split_by_patient(records, [], 0.25, seed)) for seed in range(6)}) == 6


def test_linked_patients_stay_together() -> None:
    records = random_records(4)
    patients = sorted({item.patient for item in records})
    links = [(patients[0], patients[5]), (patients[5], patients[3]), (patients[7], "unknown")]
    for seed in range(10):
        split = split_by_patient(records, links, 0.3, seed)
        held_out = {item.patient for item in split.held_out}
        assert len({patient in held_out for patient in (patients[0], patients[3], patients[5])}) == 1


def test_class_with_one_patient_is_refused_by_name() -> None:
    records = [record("P001", "I", 0), record("P002", "I", 1), record("P007", "R", 2), record("P007", "R", 3)]
    with pytest.raises(UserError, match=r"class R has one patient \(P007\)"):
        split_by_patient(records, [], 0.25, 0)
    records.append(record("P008", "R", 4))
    split_by_patient(records, [], 0.25, 0)
    with pytest.raises(UserError, match=r"class R has 2 patients \(P007, P008\) who share pictures"):
        split_by_patient(records, [("P008", "P007")], 0.25, 0)


def test_classes_that_no_division_can_separate_are_refused() -> None:
    pairs = [("A", "I"), ("B", "I"), ("B", "P"), ("C", "P"), ("C", "R"), ("A", "R")]
    records = [record(patient, label, number) for number, (patient, label) in enumerate(pairs)]
    with pytest.raises(UserError, match="no division of the 3 patients"):
        split_by_patient(records, [], 0.5, 0)


def test_digest_names_files_boxes_labels_and_sides_but_not_their_order() -> None:
    split = split_by_patient(random_records(0), [], 0.25, 0)
    digest = dataset_digest(split)
    assert len(digest) <= 36
    assert dataset_digest(Split(split.train[::-1], split.held_out)) == digest
    assert dataset_digest(Split(split.held_out, split.train)) != digest
    first = split.train[0]
    for changed in (replace(first, box=(0, 0, 9, 9)), replace(first, label="X"), replace(first, digest="f" * 64)):
        assert dataset_digest(Split((changed, *split.train[1:]), split.held_out)) != digest
    assert dataset_digest(Split((replace(first, path=Path("moved")), *split.train[1:]), split.held_out)) == digest
