"""What each epoch's evaluation gave, on disk beside the checkpoints, so that a resumed run need not measure again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dfu_mlflow.checkpoint import write_json
from dfu_mlflow.evaluator import Baseline, Measurement
from dfu_mlflow.types import Estimate, EvalReport


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

    def add(self, epoch: int, figures: dict[str, float], measured: dict[str, Measurement]) -> None:
        """Keep an epoch's figures; the base's reports and losses too, which later epochs are compared with."""
        entry: dict[str, Any] = {"figures": figures}
        if epoch == 0:
            base = measured["live"]
            entry["base"] = {"reports": [asdict(report) for report in base.reports], "losses": base.losses.tolist()}
        self.epochs[str(epoch)] = entry
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

    def baseline(self) -> Baseline | None:
        """The untouched base's measurement, None before it was made."""
        if "0" not in self.epochs:
            return None
        base = self.epochs["0"]["base"]
        return Baseline(
            tuple(_report(report) for report in base["reports"]), torch.tensor(base["losses"], dtype=torch.float64)
        )


def _report(content: dict[str, Any]) -> EvalReport:
    values = {name: Estimate(**estimate) for name, estimate in content["values"].items()}
    return EvalReport(values, content["identity"], content["weights"], content["notes"])
