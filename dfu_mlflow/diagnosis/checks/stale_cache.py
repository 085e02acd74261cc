"""Cached latents of another autoencoder, crop or file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from dfu_mlflow.data import RowCache, encode_latents
from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy

ROWS = 8
STALE = 0.05
"""Relative distance of latents encoded anew from the cached ones; batches of another size make 1e-6, bfloat16 0.01."""


class StaleCache(Check):
    """A few training views encoded anew beside what the cache holds for them."""

    id = "stale_cache"
    needs = ("base", "photographs", "the run's cache")
    cost = "probe"

    def examine(self, case: Case) -> Finding | Healthy:
        """Rows spread over the set; one stale row is enough."""
        bench = case.ready()
        bench.require("cache")
        material, config = bench.material, bench.config
        records = material.source.split.train
        chosen = torch.linspace(0, len(records) - 1, min(ROWS, len(records))).round().long().tolist()
        views = config.data.views_per_image
        rows = torch.tensor([number * views + view for number in chosen for view in range(views)])
        with tempfile.TemporaryDirectory() as folder:
            picked = [records[number] for number in chosen]
            fresh = encode_latents(picked, config.data, config.seed, RowCache(Path(folder) / "fresh"), material.encoder)
        kept, anew = (
            part.chunk(2, dim=1)[0].flatten(1) for part in (material.train.moments[rows].float(), fresh.moments[:])
        )
        gaps = (kept - anew).norm(dim=1) / anew.norm(dim=1)
        stale = float((gaps > STALE).double().mean())
        evidence = {
            "largest_difference": Figure(float(gaps.max()), f"below {STALE}, relative"),
            "stale_share": Figure(stale, "0"),
        }
        if stale == 0:
            return Healthy(evidence)
        return self.found(
            "blocker",
            0.97,
            evidence,
            f"{100 * stale:.0f} % of the cached latents that were looked at are not what the photographs give today: "
            "another "
            "autoencoder, crop or file made them. Encode anew into an empty cache.",
            {"data.cache_dir": f"{material.cache.folder}-fresh"},
        )
