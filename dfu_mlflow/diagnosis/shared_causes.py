"""What do the failing runs share that the others do not?

Every setting and finding that parts the runs in two is a trait; traits that part them alike cannot be told apart and
stand as one group. Groups are ranked by the correlation of their trait with the rank of the outcome (the
Mann-Whitney statistic, scaled); a run without a figure counts as worst. The chance beside each is of the largest
correlation among all groups when outcomes are shuffled over the runs, so that it holds however many traits were looked
through (Westfall and Young 1993, max-T).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from dfu_mlflow.config.tuning import is_fixed
from dfu_mlflow.diagnosis.finding import SEVERITIES
from dfu_mlflow.errors import UserError

Mask = npt.NDArray[np.bool_]

SHUFFLES = 9_999
LEAST_RUNS = 4
"""Of three runs every trait parts them as well as any other."""
# fmt: off
NO_CAUSE = (
    "output_dir", "resume", "device", "data.cache_dir", "checkpoint.", "runtime.", "tracking.", "registry.", "tune.",
    "gates.", "evaluation.", "metrics.", "memorisation.", "utility.",
)
# fmt: on
"""Settings that change no weight and no picture."""
CHANCE = ("seed", "data.phantom.")
"""Settings that no plan varies as a factor: what is drawn."""
FEATURES = ("prompts", "ema", "adapter", "loss.perceptual_loss")
"""Sections whose settings make sense together only: one factor of a study each."""


@dataclass(frozen=True)
class Attempt:
    """One run.

    Attributes:
        name: for a person.
        settings: dotted key -> value, all of them.
        findings: id -> severity, or `sound`; only what was looked for.
        value: its outcome, larger is better; None where it ended without.
        fails: is it one of the runs to be explained?
    """

    name: str
    settings: Mapping[str, Any]
    findings: Mapping[str, str]
    value: float | None
    fails: bool


@dataclass(frozen=True)
class Trait:
    """Something that some runs have and others have not.

    Attributes:
        key: dotted setting, or a finding's id.
        text: the level that goes with failing, such as `ema.decay >= 0.999`.
        is_setting: False for a finding.
        low, high: values of a setting where the trait is absent and present, the most frequent of each side.
    """

    key: str
    text: str
    is_setting: bool
    low: Any = None
    high: Any = None


@dataclass(frozen=True)
class SharedCause:
    """Traits that part the runs alike.

    Attributes:
        traits: one, or several that always changed together.
        correlation: with the rank of the outcome, 0 to 1; 1 explains every run.
        chance: of such a correlation by luck, among all that was looked through.
        failing_with, failing_without, other_with, other_without: numbers of runs.
    """

    traits: tuple[Trait, ...]
    correlation: float
    chance: float
    failing_with: int
    failing_without: int
    other_with: int
    other_without: int

    @property
    def confounded(self) -> bool:
        """Do settings of several factors stand in it?"""
        return len(self.factors()) > 1

    def factors(self) -> dict[str, list[Trait]]:
        """Name of a factor -> its settings."""
        found: dict[str, list[Trait]] = {}
        for trait in self.traits:
            if trait.is_setting and not trait.key.startswith(CHANCE):
                section = next((name for name in FEATURES if trait.key.startswith(f"{name}.")), trait.key)
                found.setdefault(section, []).append(trait)
        return found

    @property
    def fixed(self) -> list[str]:
        """Settings among them that no study may change, for its figures could not be compared then."""
        return [trait.key for trait in self.traits if trait.is_setting and is_fixed(trait.key)]

    def plan(self) -> dict[str, Any]:
        """A factorial for `study` that separates the factors; contents of a plan's YAML file."""
        names = " and ".join(self.factors())
        factors = {
            name: {
                "healthy": {trait.key: trait.low for trait in traits},
                "failing": {trait.key: trait.high for trait in traits},
            }
            for name, traits in self.factors().items()
        }
        description = f"{names} always changed together in the runs compared; this separates them."
        return {"description": description, "factors": factors}


@dataclass(frozen=True)
class Comparison:
    """What was found over all runs.

    Attributes:
        attempts: the runs, best first.
        causes: best explanation first.
        notes: what could not be compared, and why.
    """

    attempts: tuple[Attempt, ...]
    causes: tuple[SharedCause, ...]
    notes: tuple[str, ...] = field(default=())

    def document(self) -> str:
        """`shared_causes.json`."""
        causes = [
            {
                "traits": [trait.text for trait in cause.traits],
                "correlation": round(cause.correlation, 4),
                "chance": round(cause.chance, 4),
                "failing_with": cause.failing_with,
                "failing_without": cause.failing_without,
                "other_with": cause.other_with,
                "other_without": cause.other_without,
                "confounded": list(cause.factors()) if cause.confounded else [],
            }
            for cause in self.causes
        ]
        runs = [{"name": each.name, "value": each.value, "fails": each.fails} for each in self.attempts]
        return json.dumps({"causes": causes, "runs": runs, "notes": list(self.notes)}, indent=1, ensure_ascii=False)


def shared_causes(attempts: Sequence[Attempt], seed: int = 0) -> Comparison:
    """Rank what the runs differ in by how well it explains which of them fail.

    Args:
        attempts: at least four, failing ones and others among them.
        seed: of the shuffles.

    Raises:
        UserError: for too few runs, or runs of one kind alone.
    """
    failing = sum(attempt.fails for attempt in attempts)
    if len(attempts) < LEAST_RUNS:
        raise UserError(f"{len(attempts)} runs cannot be compared: give at least {LEAST_RUNS} (--runs)")
    if failing in (0, len(attempts)):
        kind = "none" if failing == 0 else "every one"
        raise UserError(f"{kind} of the {len(attempts)} runs fails: there is nothing to compare (--failing, --runs)")
    ordered = tuple(sorted(attempts, key=lambda each: -np.inf if each.value is None else each.value, reverse=True))
    groups: dict[bytes, tuple[Mask, list[Trait]]] = {}
    outcome = _badness(ordered)
    for key, mask, is_setting, high, low in _partitions(ordered):
        if _correlation(mask, outcome) < 0:  # the trait is named after the side that does worse
            mask, high, low = ~mask, low, high
        trait = Trait(key, _text(key, high, is_setting), is_setting, *_common(ordered, key, mask, is_setting))
        groups.setdefault(mask.tobytes(), (mask, []))[1].append(trait)
    chances = _chances(np.array([mask for mask, _ in groups.values()]), outcome, seed)
    causes = [
        SharedCause(tuple(traits), _correlation(mask, outcome), chance, *_counts(mask, ordered))
        for (mask, traits), chance in zip(groups.values(), chances, strict=True)
    ]
    return Comparison(ordered, tuple(sorted(causes, key=lambda cause: -cause.correlation)), tuple(_notes(ordered)))


def _partitions(attempts: Sequence[Attempt]) -> Iterator[tuple[str, Mask, bool, str, str]]:
    """(key, which runs, is it a setting, words for them, words for the others), each that parts the runs in two."""
    for name in sorted({name for each in attempts for name in each.findings}):
        answers = [each.findings.get(name) for each in attempts]
        mask = np.array([answer in SEVERITIES[1:] for answer in answers])
        if None not in answers and 0 < mask.sum() < len(mask):
            yield name, mask, False, "found", "sound"
    for key in sorted({key for each in attempts for key in each.settings}):
        if key.startswith(NO_CAUSE):
            continue
        values = [each.settings.get(key) for each in attempts]
        for mask, high, low in _levels(values):
            if 0 < mask.sum() < len(mask):
                yield key, mask, True, high, low


def _levels(values: Sequence[Any]) -> Iterator[tuple[Mask, str, str]]:
    """Numbers are parted at every value, anything else by every value; (which, words for them, words for the rest)."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        for bound in sorted(set(values))[1:]:
            yield np.array([value >= bound for value in values]), f">= {bound:g}", f"< {bound:g}"
        return
    shown = [json.dumps(value, ensure_ascii=False, sort_keys=True) for value in values]
    texts = sorted(set(shown))
    for text in texts if len(texts) > 2 else texts[1:]:
        rest = f"= {texts[0]}" if len(texts) == 2 else f"is not {text}"
        yield np.array([value == text for value in shown]), f"= {text}", rest


def _text(key: str, words: str, is_setting: bool) -> str:
    return f"{key} {words}" if is_setting else f"finding {key}: {words}"


def _common(attempts: Sequence[Attempt], key: str, mask: Mask, is_setting: bool) -> tuple[Any, Any]:
    """Most frequent value of a setting where the trait is absent, and where it is present."""
    if not is_setting:
        return None, None
    sides = []
    for side in (~mask, mask):
        values = [each.settings.get(key) for each, chosen in zip(attempts, side, strict=True) if chosen]
        shown = Counter(json.dumps(value, sort_keys=True) for value in values)
        sides.append(json.loads(shown.most_common(1)[0][0]))
    return sides[0], sides[1]


def _badness(attempts: Sequence[Attempt]) -> npt.NDArray[np.float64]:
    """Rank of each outcome, worst highest; runs without a figure share the last rank."""
    lost = [-np.inf if each.value is None else -each.value for each in attempts]
    worst = [np.inf if each.value is None else value for each, value in zip(attempts, lost, strict=True)]
    return np.asarray(rankdata(worst), np.float64)


def _correlation(mask: Mask, outcome: npt.NDArray[np.float64]) -> float:
    if outcome.std() == 0:
        return 0.0
    return float(np.corrcoef(mask.astype(np.float64), outcome)[0, 1])


def _chances(masks: Mask, outcome: npt.NDArray[np.float64], seed: int) -> list[float]:
    """How often the largest correlation of all masks [M, N] under shuffled outcomes [N] reaches each one's own."""
    if not len(masks):
        return []
    columns = masks.astype(np.float64)
    columns = (columns - columns.mean(axis=1, keepdims=True)) / columns.std(axis=1, keepdims=True)
    spread = outcome.std() or 1.0
    scaled = (outcome - outcome.mean()) / spread / len(outcome)
    generator = np.random.default_rng(seed)
    shuffled = generator.permuted(np.tile(scaled[:, None], SHUFFLES), axis=0)
    largest = np.abs(columns @ shuffled).max(axis=0)
    own = np.abs(columns @ scaled)
    return [float((1 + (largest >= each - 1e-12).sum()) / (SHUFFLES + 1)) for each in own]


def _counts(mask: Mask, attempts: Sequence[Attempt]) -> tuple[int, int, int, int]:
    fails = np.array([each.fails for each in attempts])
    return (
        int((fails & mask).sum()),
        int((fails & ~mask).sum()),
        int((~fails & mask).sum()),
        int((~fails & ~mask).sum()),
    )


def _notes(attempts: Sequence[Attempt]) -> Iterator[str]:
    names = sorted({name for each in attempts for name in each.findings})
    missing = [name for name in names if any(name not in each.findings for each in attempts)]
    if missing:
        yield f"not looked for in every run, and so not compared: {', '.join(missing)} (diagnose --run each first)"
    lost = sum(each.value is None for each in attempts)
    if lost:
        yield f"{lost} of the runs ended without the figure and count as worst"
