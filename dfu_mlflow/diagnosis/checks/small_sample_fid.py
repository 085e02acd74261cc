"""Frechet distances of too few pictures: mostly bias."""

from __future__ import annotations

from dfu_mlflow.diagnosis.case import PICTURES_TAG, Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking

DIMENSIONS = {"fid": 2048, "fd": 1280}
"""Of InceptionV3's and of EfficientNet-Lite0's pooled features."""
FLOOR_SHARE = 0.3
"""Share of the base's distance that photographs of other patients reach at the same number of pictures, from which the
distance says more about the number than about the pictures."""


class SmallSampleFid(Check):
    """Number of pictures beside the features' dimension, and the floor beside the base's distance."""

    id = "small_sample_fid"
    needs = ("evaluation.samples", "evaluation.best_metric", "eval/fid or eval/fd with its floor")
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """It matters where the distance chooses; where KID chooses it is worth a note at most."""
        samples = int(case.tags.get(PICTURES_TAG) or case.setting("evaluation.samples"))
        logged = next((name for name in DIMENSIONS if case.curves.get(f"eval/{name}")), None)
        if logged is None and "evaluation.best_metric" not in case.settings:
            raise Lacking("no distance was logged, and nothing says what chooses the checkpoint")
        logged = logged or "fid"
        chosen_by = str(case.settings.get("evaluation.best_metric", logged))
        metric = next((name for name in DIMENSIONS if chosen_by.startswith(name)), logged)
        dimension = DIMENSIONS[metric]
        evidence = {"samples": Figure(float(samples), f"above {dimension}"), "chosen_by": Figure(chosen_by, "kid")}
        if samples <= 0:
            raise Lacking("no pictures are drawn for metrics (evaluation.samples 0)")
        floor, base = case.curves.get(f"eval/{metric}_floor"), case.curves.get(f"eval/{metric}")
        if floor and base:
            share = floor[max(floor)] / max(base.values())
            evidence["floor_share_of_base"] = Figure(share, f"below {FLOOR_SHARE}")
        if samples >= dimension or not chosen_by.startswith(("fid", "fd")):
            return Healthy(evidence)
        return self.found(
            "warning",
            0.9,
            evidence,
            f"{metric.upper()} of {samples} pictures in {dimension:,} dimensions is mostly bias, and it chooses the "
            "best "
            "checkpoint. Choose by KID, which has no such bias, and read its interval.",
            {"evaluation.best_metric": "kid"},
        )
