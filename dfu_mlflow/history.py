"""What each epoch's evaluation gave, on disk beside the checkpoints, so that a resumed run need not measure again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from dfu_mlflow.checkpoint import write_json
from dfu_mlflow.evaluator import Baseline, Measurement
from dfu_mlflow.types import Estimate, EvalReport

BASE, QUICK_BASE = "base", "base_quick"


class History:
    """Figures by epoch and weights, in `history.json`.

    Args:
        path: the file; read if it is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.epochs: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self.epochs = json.loads(path.read_text(encoding="utf-8"))

    def add(
        self,
        epoch: int,
        figures: dict[str, float],
        measured: Mapping[str, Measurement],
        quick: Mapping[str, Measurement] = MappingProxyType({}),
    ) -> None:
        """Keep an epoch's figures; the base's reports and losses too, which later epochs are compared with.

        Args:
            measured: weights -> what they were measured as in full.
            quick: the same on the fewer pictures of a quick evaluation.
        """
        entry: dict[str, Any] = {"figures": figures}
        if epoch == 0:
            known = {BASE: measured, QUICK_BASE: quick}
            entry |= {name: _base(sets["live"]) for name, sets in known.items() if sets}
        self.epochs[str(epoch)] = entry
        write_json(self.path, self.epochs)

    def amend(self, epoch: int, figures: Mapping[str, float]) -> None:
        """More figures of an epoch."""
        self.epochs[str(epoch)]["figures"] |= figures
        write_json(self.path, self.epochs)

    def figures(self, epoch: int) -> dict[str, float]:
        """The figures of an epoch, by the names that MLflow shows."""
        return dict(self.epochs.get(str(epoch), {}).get("figures", {}))

    def measured(self) -> list[int]:
        """Epochs that were evaluated."""
        return sorted(map(int, self.epochs))

    def series(self, name: str) -> dict[int, float]:
        """Epoch -> value of one figure."""
        return {int(epoch): entry["figures"][name] for epoch, entry in self.epochs.items() if name in entry["figures"]}

    def series_of(self, metric: str, weights: str) -> dict[int, float]:
        """Epoch -> `eval/METRIC` of these weights, `live` or `ema`; epoch 0 is the untouched base for both."""
        name, found = f"eval/{metric}", {}
        for epoch in self.measured():
            own = figures_of_weights(self.figures(epoch), weights if epoch else "live")
            if name in own:
                found[epoch] = own[name]
        return found

    def baseline(self, quick: bool = False) -> Baseline | None:
        """The untouched base's measurement, in full or as quick ones are made; None before it was made."""
        base = self.epochs.get("0", {}).get(QUICK_BASE if quick else BASE)
        if base is None:
            return None
        return Baseline(
            tuple(_report(report) for report in base["reports"]), torch.tensor(base["losses"], dtype=torch.float64)
        )


def figures_of_weights(figures: Mapping[str, float], weights: str) -> dict[str, float]:
    """The `eval/` and `val/` figures of one set of weights, `live` or `ema`, both under the plain names.

    Whoever speaks of the weights that were chosen asks here: `eval/kid` alone is always the live ones'.
    """
    suffix = "" if weights == "live" else "_ema"
    found: dict[str, float] = {}
    for group in ("eval", "val"):
        prefix = f"{group}{suffix}/"
        own = {name.removeprefix(prefix): value for name, value in figures.items() if name.startswith(prefix)}
        found |= {f"{group}/{name}": value for name, value in own.items()}
    return found


def _base(base: Measurement) -> dict[str, Any]:
    return {"reports": [asdict(report) for report in base.reports], "losses": base.losses.tolist()}


def _report(content: dict[str, Any]) -> EvalReport:
    values = {name: Estimate(**estimate) for name, estimate in content["values"].items()}
    return EvalReport(values, content["identity"], content["weights"], content["notes"])
