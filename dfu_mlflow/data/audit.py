"""What was found among the files: counts, and every file that cannot or perhaps should not be used, with the reason."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dfu_mlflow.data.packs import make_private_folder, write_private
from dfu_mlflow.errors import UserError

Kind = Literal[
    "unreadable",
    "empty file",
    "missing file",
    "unsupported format",
    "misplaced",
    "too small",
    "blank",
    "mask",
    "duplicate",
    "mislabelled",
    "no label",
    "no bounding box",
    "bad bounding box",
    "near-duplicate",
    "clipped box",
    "small box",
    "box without image",
    "shared file name",
]

NOTES: frozenset[Kind] = frozenset(
    {"near-duplicate", "clipped box", "small box", "box without image", "shared file name", "no bounding box"}
)
"""Kinds that do not count against `data.max_bad_fraction`."""

EXAMPLES = 3


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file, or with one bounding box of it.

    Attributes:
        path: the file, or the name by which a table speaks of it.
        kind: which of the known troubles.
        reason: one phrase for a person.
    """

    path: Path
    kind: Kind
    reason: str


@dataclass(frozen=True)
class ClassCount:
    """How many pictures and patients of one class stand on each side of the split."""

    label: str
    train_images: int
    train_patients: int
    held_out_images: int
    held_out_patients: int


@dataclass(frozen=True)
class Audit:
    """The report on a data set, complete before training starts.

    Attributes:
        files: image files found, usable or not.
        left_out_files: files that no picture is taken from.
        unusable_files: of these the ones that are broken, duplicate or contradictory.
        boxed_images: pictures cut out by a bounding box.
        images: pictures taken, of which a file may give several.
        ignored_files: files that are no images by their name.
        classes: counts by class; a patient with several classes counts in each.
        patients: distinct patients.
        problems: everything that was noticed, in path order; kinds in `NOTES` are remarks.
    """

    files: int
    left_out_files: int
    unusable_files: int
    ignored_files: int
    images: int
    boxed_images: int
    classes: tuple[ClassCount, ...]
    patients: int
    problems: tuple[Problem, ...]

    @property
    def bad_fraction(self) -> float:
        """Share of the image files that cannot be used, 0..1."""
        return self.unusable_files / self.files if self.files else 0.0

    def in_short(self) -> str | None:
        """One line for the start of a run; None where there is nothing to say."""
        remarked = len({problem.path for problem in self.problems if problem.kind in NOTES})
        said = [f"{self.left_out_files} of {self.files} image files are left out"] if self.left_out_files else []
        said += [f"{remarked} have remarks"] if remarked else []
        if self.boxed_images:
            said.append(f"{self.boxed_images} of {self.images} images are cut out by a bounding box")
        return f"{', '.join(said)}: see --dry-run" if said else None

    def table(self) -> str:
        """The report as lines of text: counts by class and side, then problems by kind with examples."""
        lines = [
            f"{'class':<16}{'train images':>14}{'patients':>10}{'held-out images':>18}{'patients':>10}{'share':>8}"
        ]
        for row in self.classes:
            share = row.held_out_images / max(1, row.train_images + row.held_out_images)
            lines.append(
                f"{row.label:<16}{row.train_images:>14}{row.train_patients:>10}"
                f"{row.held_out_images:>18}{row.held_out_patients:>10}{share:>8.1%}"
            )
        lines.append(
            f"{self.files} image files of {self.patients} patients, {self.left_out_files} left out, of these "
            f"{self.unusable_files} unusable ({self.bad_fraction:.1%}); {self.ignored_files} other files ignored"
        )
        if self.boxed_images:
            lines.append(f"{self.boxed_images} of {self.images} images are cut out by a bounding box")
        return "\n".join(lines + list(summary(self.problems)))


def summary(problems: Sequence[Problem]) -> tuple[str, ...]:
    """One line a kind of problem, most frequent first: how many, and the first few."""
    counts = Counter(problem.kind for problem in problems)
    lines = []
    for kind, count in counts.most_common():
        chosen = [problem for problem in problems if problem.kind == kind][:EXAMPLES]
        examples = ", ".join(f"{problem.path.name} ({problem.reason})" for problem in chosen)
        lines.append(f"{count} {kind}: {examples}{', ...' if count > EXAMPLES else ''}")
    return tuple(lines)


def refuse_bad_data(audit: Audit, max_bad_fraction: float, cache_dir: Path) -> None:
    """Stop where too many files are unusable.

    Raises:
        UserError: with the counts by reason, first examples, and the file that lists all of them. The list is put
            into the private cache, because file names may tell who a patient is.
    """
    if audit.bad_fraction <= max_bad_fraction:
        return
    listing = _write_list(audit.problems, cache_dir / "audits")
    reasons = "; ".join(summary([problem for problem in audit.problems if problem.kind not in NOTES]))
    raise UserError(
        f"{audit.unusable_files} of {audit.files} image files ({audit.bad_fraction:.1%}) cannot be used, more than "
        f"--data.max_bad_fraction {max_bad_fraction:g}: {reasons}; complete list: {listing}"
    )


def _write_list(problems: Sequence[Problem], folder: Path) -> Path:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["path", "kind", "reason"])
    writer.writerows([str(problem.path), problem.kind, problem.reason] for problem in problems)
    content = text.getvalue().encode(errors="surrogateescape")
    path = folder / f"audit-{hashlib.sha256(content).hexdigest()[:12]}.csv"
    make_private_folder(folder.parent)
    make_private_folder(folder)
    write_private(path, content)
    return path
