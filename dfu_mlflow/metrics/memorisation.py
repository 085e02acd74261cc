"""Are photographs of patients among the generated pictures, and does the model know whom it was trained on?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dfu_mlflow.config.measures import MemorisationConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.copies import CopyReference, TrainingAppearances, similar_share
from dfu_mlflow.metrics.matched_share import matched_training_excess
from dfu_mlflow.metrics.nearest import Neighbours
from dfu_mlflow.types import Estimate

SSCD = "sscd"
"""Name of the copy-detection features for which published levels exist."""
SSCD_LEVEL = 0.5
MIN_IMAGES = 20
PROTOCOL = 1
"""Raised by whoever changes what a figure means."""


@dataclass(frozen=True)
class Suspect:
    """A generated picture and the training photograph it may be a copy of.

    Attributes:
        generated: row among the generated pictures.
        photograph: row among the training photographs.
        features: which features show the smallest ratio.
        ratio: neighbour-gap ratio there.
        similarity: cosine there.
        below: whether the ratio is below those features' threshold.
    """

    generated: int
    photograph: int
    features: str
    ratio: float
    similarity: float
    below: bool


@dataclass(frozen=True)
class MemorisationReport:
    """Figures of one set of generated pictures.

    Attributes:
        values: `FEATURES/gap_share`, `FEATURES/gap_share_real`, `FEATURES/copy_excess`,
            `FEATURES/matched_training_excess`; `sscd/similar_share` and the like; `membership_auc` when it was given.
        found: copies are among them, beyond what other patients' photographs explain; None where that cannot be told.
        because: the sentence for it.
        suspects: all generated pictures, the likeliest copy first.
        identity: what the figures depend on besides the pictures.
        notes: what could not be computed, or must be known to read the figures.
    """

    values: dict[str, Estimate]
    found: bool | None
    because: str
    suspects: tuple[Suspect, ...]
    identity: str
    notes: dict[str, str] = field(default_factory=dict)


class MemorisationReference:
    """The real side: built once, then `report` judges generated pictures.

    Args:
        features: name -> real photographs in those features, e.g. `pixels`, `efficientnet_lite0`, `sscd`. More than one
            kind is better: each overlooks other copies.
        identities: name -> what those features are (extractor, weights' hash, resize).
        config: neighbours, thresholds.
        seed: of the choice of rows where counts must be equal.

    Raises:
        UserError: for fewer training photographs than neighbours, or no features at all.
    """

    def __init__(
        self,
        features: Mapping[str, TrainingAppearances],
        identities: Mapping[str, str],
        config: MemorisationConfig,
        seed: int = 0,
    ) -> None:
        if not features:
            raise UserError("memorisation needs features of the training photographs in at least one kind")
        self.config, self.seed = config, seed
        self.references = {name: CopyReference(each, config) for name, each in features.items()}
        self.notes = {
            f"{name}/patients": _same_patient_note(each)
            for name, each in self.references.items()
            if each.threshold < config.threshold
        }
        kinds = ", ".join(identities[name] for name in features)
        size = len(next(iter(features.values())).training)
        self.identity = f"{kinds}; {size} training photographs, {config.neighbours} neighbours; protocol {PROTOCOL}"

    def report(self, generated: Mapping[str, torch.Tensor], membership: Estimate | None = None) -> MemorisationReport:
        """Judge generated pictures by their features, name -> [M, D] in the same rows for every kind.

        Raises:
            UserError: for kinds of features or row counts that do not fit.
        """
        counts = {len(each) for each in generated.values()}
        if generated.keys() != self.references.keys() or len(counts) != 1:
            raise UserError(
                f"memorisation was set up for {', '.join(self.references)}; given are"
                f" {', '.join(f'{name} {list(each.shape)}' for name, each in generated.items())}"
            )
        notes = dict(self.notes)
        values = {} if membership is None else {"membership_auc": membership}
        if (count := counts.pop()) < MIN_IMAGES:
            notes["copies"] = f"{count} generated pictures, at least {MIN_IMAGES} are needed to call them copies or not"
        found = {name: reference.neighbours(generated[name]) for name, reference in self.references.items()}
        for name, reference in self.references.items():
            if not count:
                continue
            values |= {f"{name}/{key}": value for key, value in reference.figures(found[name]).items()}
            if name == SSCD:
                levels = similar_share(found[name], reference, SSCD_LEVEL)
                values |= {f"{name}/{key}": value for key, value in levels.items()}
            matched = matched_training_excess(generated[name], reference.features, self.seed)
            values[f"{name}/matched_training_excess"] = matched
        decided, because = self._decide(values) if count >= MIN_IMAGES else (None, notes["copies"])
        suspects = self._suspects(found)
        if below := sum(suspect.below for suspect in suspects):
            notes["suspects"] = f"{below} of {count} pictures are nearer than the threshold: look at the closest pairs"
        return MemorisationReport(values, decided, because, suspects, self.identity, notes)

    def suspects(self, generated: Mapping[str, torch.Tensor]) -> tuple[Suspect, ...]:
        """Each generated picture beside its nearest photograph, in the pictures' order; features as for `report`."""
        found = {name: reference.neighbours(generated[name]) for name, reference in self.references.items()}
        return tuple(sorted(self._suspects(found), key=lambda each: each.generated))

    def _decide(self, values: Mapping[str, Estimate]) -> tuple[bool, str]:
        excess = {name: values[f"{name}/copy_excess"] for name in self.references}
        worst = max(excess, key=lambda name: excess[name].low or 0.0)
        estimate = excess[worst]
        found = estimate.low is not None and estimate.low > self.config.max_copy_excess
        interval = f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"
        if found:
            return (
                True,
                f"copies found: {interval} more pictures than chance lie next to a training photograph ({worst})",
            )
        return (
            False,
            f"not more pictures than chance explains lie next to a training photograph: excess {interval} ({worst})",
        )

    def _suspects(self, found: Mapping[str, Neighbours]) -> tuple[Suspect, ...]:
        """Each picture by the features that come closest to their threshold; smallest ratio to threshold first."""
        suspects = []
        for row in range(len(next(iter(found.values())).ratio)):
            name = min(found, key=lambda each: self._closeness(each, found[each], row))
            closest = found[name]
            ratio = float(closest.ratio[row])
            below = ratio < self.references[name].threshold
            similarity = float(closest.similarity[row])
            suspects.append(Suspect(row, int(closest.index[row]), name, ratio, similarity, below))
        return tuple(
            sorted(suspects, key=lambda each: each.ratio / max(self.references[each.features].threshold, 1e-9))
        )

    def _closeness(self, name: str, found: Neighbours, row: int) -> float:
        return float(found.ratio[row]) / max(self.references[name].threshold, 1e-9)


def _same_patient_note(reference: CopyReference) -> str:
    return (
        f"{reference.real_share.value:.1%} of real photographs lie next to a training photograph of another patient, so"
        f" the threshold is {reference.threshold:.2f} instead of {reference.config.threshold:g}: are patients told"
        " apart? See --data.group_by"
    )
