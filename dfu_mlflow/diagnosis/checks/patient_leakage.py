"""One patient in training and validation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from dfu_mlflow.data import evaluation_pixels
from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.metrics.coarse_pixels import coarse_pixels
from dfu_mlflow.types import Record

ALIKE = 0.995
"""Cosine of `coarse_pixels` from which two photographs are taken for one: shots of one pose, a moment apart."""
MANY = 0.02
"""Share of held-out photographs with such a partner in training that is worth a warning."""
FEWEST = 3
"""Such photographs below which chance has made them."""
DATE = re.compile(r"(?:19|20)\d{6}$")
"""A stem that ends so names a day: what cameras call their files."""
STEMS = (
    re.compile(r"^(.*?[A-Za-z]+[-_]?\d+)[-_. ].+"),
    re.compile(r"^([A-Za-z]*\d+)[A-Za-z_-].+"),
    re.compile(r"^(.+?)[-_. ]\d+\.\w+$"),
)
"""How file names usually carry a patient: up to a separator; letters and digits at the start; up to a last number."""
LEAST_PER_STEM = 1.5
"""Photographs a stem has on average where it can name patients."""
MOST_PER_STEM = 0.2
"""Share of all photographs that one stem has at most: beyond that it names the whole set."""
SHARED = 0.1
"""Share of held-out photographs whose stem is in training as well, from which the split looks as if made by image."""


class PatientLeakage(Check):
    """Shared patients, stems of file names on both sides, near-duplicates across the split."""

    id = "patient_leakage"
    needs = ("photographs and how they are split",)
    cost = "probe"

    def examine(self, case: Case) -> Finding | Healthy:
        """Look at who is on which side, by name and by sight."""
        bench = case.ready()
        bench.require("photographs", "split")
        split, config = bench.split, bench.config.data
        shared = {record.patient for record in split.train} & {record.patient for record in split.held_out}
        evidence = {"shared_patients": Figure(float(len(shared)), "0")}
        stems = 0.0
        if config.group_by == "none":
            stems, pattern = shared_stems(split.train, split.held_out)
            evidence["held_out_with_a_stem_in_training"] = Figure(stems, f"below {SHARED}")
        train, held = (coarse_pixels(evaluation_pixels(side, config)) for side in (split.train, split.held_out))
        doubles = (held @ train.T).max(dim=1).values > ALIKE
        alike = float(doubles.double().mean()) if int(doubles.sum()) >= FEWEST else 0.0
        evidence["held_out_with_a_double_in_training"] = Figure(alike, f"below {MANY}")
        if not shared and stems < SHARED and alike < MANY:
            return Healthy(evidence)
        fix = {"data.group_by": pattern.pattern} if stems >= SHARED else {}
        return self.found(
            "warning",
            0.98 if shared else 0.8 if stems >= SHARED else 0.7,
            evidence,
            "Photographs of one patient stand in training and validation both: validation figures flatter, and copies "
            f"are not noticed. {_advice(bool(fix))}",
            fix,
        )


def _advice(told: bool) -> str:
    """What to do, where file names tell the patients and where they do not."""
    if told:
        return "Split by patient."
    return "No setting mends this by itself: name the patients in a manifest, and split by its column (data.group_by)."


def shared_stems(train: Sequence[Record], held_out: Sequence[Record]) -> tuple[float, re.Pattern[str]]:
    """Share of held-out photographs whose file name's stem is in training too, by the pattern that shows most of it."""
    best, chosen = 0.0, STEMS[0]
    for pattern in STEMS:
        sides = [[_stem(pattern, record) for record in side] for side in (train, held_out)]
        counts = Counter(sides[0] + sides[1])
        if sum(counts.values()) < LEAST_PER_STEM * len(counts) or max(counts.values()) > MOST_PER_STEM * counts.total():
            continue
        known = set(sides[0])
        share = sum(stem in known for stem in sides[1]) / len(sides[1])
        if share > best:
            best, chosen = share, pattern
    return best, chosen


def _stem(pattern: re.Pattern[str], record: Record) -> str:
    match = pattern.match(record.path.name)
    return match.group(1) if match and not DATE.search(match.group(1)) else record.path.name
