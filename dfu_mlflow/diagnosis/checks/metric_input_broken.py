"""Metrics that are fed wrapped, inverted or unscaled pictures."""

from __future__ import annotations

import torch

from dfu_mlflow.diagnosis.bench import Bench
from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.metrics.extractors.pixels import STATISTICS, colour_statistics, value_signs
from dfu_mlflow.metrics.value_range import range_signs
from dfu_mlflow.phases import phase
from dfu_mlflow.runtime import derive_seed

ERRORS = 6.0
"""Standard errors by which a logged colour figure of the untouched base may miss the same figure measured again."""
MISSES = 0.02
"""And at least this much, of 1: kernels differ between machines in the last bits, not in these."""
AGAIN = 48
BLIND = 0.1
"""Features tell a photograph from its negative when these lie farther apart than this, of the mean distance between
photographs; the embedded features make 0.44 to 0.48."""


class MetricInputBroken(Check):
    """Value range of the pictures; logged colours of the untouched base beside its colours drawn again; and whether the
    features know a negative from a photograph."""

    id = "metric_input_broken"
    needs = ("generated pictures or the model", "held-out photographs", "eval/saturation and the like at epoch 0")
    cost = "probe"

    def examine(self, case: Case) -> Finding | Healthy:
        """The pictures first, then what the metric saw of them, then the metric itself."""
        bench = case.ready()
        evidence: dict[str, Figure] = {}
        problem = self._wrong_pictures(bench, evidence) if bench.folder or bench.has_weights else None
        problem = problem or self._other_pictures(case, bench, evidence) or self._blind(bench, evidence)
        if problem is None:
            return Healthy(evidence)
        return self.found(
            "blocker",
            0.95,
            evidence,
            f"What the metrics are fed are not the pictures: {problem}. Every distance measured on them is void. No "
            "setting mends this: the code between sampler and metric must hand over uint8 of 0 to 255, scaled once.",
            {},
        )

    def _wrong_pictures(self, bench: Bench, evidence: dict[str, Figure]) -> str | None:
        images = torch.from_numpy(bench.pictures.images)
        signs = value_signs(int(images.shape[1]), bench.material.device)
        found = range_signs(signs(images), signs(bench.photographs))
        evidence |= {
            "jumps": Figure(found.jumps, f"about {found.usual_jumps:.2g}, as photographs"),
            "inverted_overlap": Figure(found.inverted_overlap, f"not far above {found.overlap:.2g}, the pictures' own"),
            "dark_share": Figure(found.dark_share, "0"),
        }
        return found.problem

    def _other_pictures(self, case: Case, bench: Bench, evidence: dict[str, Figure]) -> str | None:
        """Does the metric see what the sampler draws? Redraw some of the base's evaluation pictures and compare."""
        logged = {name: case.curves.get(f"eval/{name}", {}).get(0) for name in STATISTICS}
        if None in logged.values():
            return None
        count = len(bench.classes)
        ids = torch.arange(AGAIN) % count
        seed = bench.config.evaluation.seed
        seeds = [derive_seed(seed, "evaluation", number % count, number // count) for number in range(AGAIN)]
        with phase("sampling for a probe", AGAIN, "pictures") as progress:
            drawn = bench.base_sampler().generate(ids, seeds, between_batches=bench.between_batches, progress=progress)
        images = torch.from_numpy(drawn)
        again = colour_statistics(bench.config.data.resolution_px, bench.material.device)(images)
        for column, name in enumerate(STATISTICS):
            mean, error = float(again[:, column].mean()), float(again[:, column].std()) / AGAIN**0.5
            told = float(logged[name] or 0.0)
            evidence[f"base_{name}_logged"] = Figure(told, f"{mean:.3f}, as drawn again")
            if abs(told - mean) > max(ERRORS * error, MISSES):
                return f"the untouched base's {name} was logged as {told:.3f} and is {mean:.3f} when drawn again"
        return None

    def _blind(self, bench: Bench, evidence: dict[str, Figure]) -> str | None:
        """A photograph's negative lies far from it, measured by how far photographs lie from each other."""
        features = bench.photograph_features
        if len(features) < 2:
            return None
        between = float(torch.pdist(features).mean())
        own = float((features - bench.extractor(255 - bench.photographs)).norm(dim=1).mean())
        ratio = own / between if between > 0 else 0.0
        evidence["negative_distance"] = Figure(ratio, "about 0.5 of the distance between photographs")
        return "the features do not tell negatives from photographs" if ratio < BLIND else None
