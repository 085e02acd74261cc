"""The founding incident, small: six faults at once, taken apart by doing what `diagnose` says first, again and again.

    python -m benchmarks.incident [--out outputs/incident] [--seed 0]

Long prompts, guidance 12, an average of decay 0.999 that is kept in bfloat16 and sampled from, a perceptual term
without gradient, bytes that wrap before the metric, and text embeddings that differ from sampling's (encoder 1's final
layer: the founding run fed encoder 1's token ids to encoder 2, which changes nothing in the embedded base, whose two
tokenizers are alike). Each round trains, diagnoses, and applies the first finding's change; where no setting mends it,
the faulty component is taken out.
`OUT/rounds.jsonl` holds a line a round, and the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo_components import dead_term, in_place_of, metric_sees, trained_on, wrapped
from benchmarks.zoo_faults import LONG
from benchmarks.zoo_lab import Exhibit, Injection, Lab, Patch
from dfu_mlflow import entry
from dfu_mlflow.diagnosis.finding import Finding
from dfu_mlflow.ema import ExponentialMovingAverage
from dfu_mlflow.evaluator import Measurement
from dfu_mlflow.trainer import Score
from dfu_mlflow.training_run import TrainingRun

SETTINGS: Mapping[str, Any] = {
    **LONG,
    "prompts.style": "detailed",
    "sampling.guidance_scale": 12.0,
    "ema.decay": 0.999,
    "ema.warmup": False,
    "evaluation.ema": True,
    "loss.perceptual_loss.enabled": True,
    "loss.perceptual_loss.weight": 0.5,
}
ROUNDS = 10


def average_in_bfloat16() -> Patch:
    """The average kept in bfloat16."""
    sound = ExponentialMovingAverage.update

    def update(self: ExponentialMovingAverage, weights: Any) -> None:
        sound(self, weights)
        self.average = {name: value.to(torch.bfloat16).float() for name, value in self.average.items()}

    return in_place_of(ExponentialMovingAverage, "update", lambda: update)


def average_judged_alone() -> Patch:
    """Samples and metrics from the average, whatever the live weights show."""
    sound = TrainingRun.best_score

    def score(self: TrainingRun, measured: dict[str, Measurement]) -> Score | None:
        return sound(self, {"ema": measured["ema"]} if "ema" in measured else measured)

    return in_place_of(TrainingRun, "best_score", lambda: score)


def components() -> dict[str, Patch]:
    """Faulty component -> how it is put in; those that a finding names stand under its id."""
    return {
        "bfloat16 average": average_in_bfloat16(),
        "average judged alone": average_judged_alone(),
        "dead_loss_term": dead_term(),
        "metric_input_broken": metric_sees(wrapped),
        "text_mismatch": trained_on("final_layer"),
    }


def mended(
    first: Mapping[str, Any], change: Mapping[str, Any], faulty: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Settings and faulty components after the first finding was acted on."""
    if first["fix"]:
        return {**change, **first["fix"]}, list(faulty)
    return dict(change), [name for name in faulty if name != first["id"]]


def said(finding: Finding) -> dict[str, Any]:
    """What the journal keeps of a finding."""
    told = finding.document()
    return {key: told[key] for key in ("id", "severity", "confidence", "evidence", "fix")}


def play(lab: Lab, number: int, seed: int, change: Mapping[str, Any], faulty: Sequence[str]) -> dict[str, Any]:
    """Train and diagnose once."""
    parts = components()
    injection = Injection(change, tuple(parts[name] for name in faulty))
    run_id = lab.train(seed, injection, f"round {number}")
    diagnosis, _ = lab.diagnose(Exhibit(run_id))
    return {"round": number, "findings": [said(each) for each in diagnosis.findings], "unable": diagnosis.unable}


def main(arguments: Sequence[str]) -> int:
    """Play rounds until nothing is found; 1 where that never comes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.incident", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/incident"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    lab = Lab(options.out)
    path = options.out / "rounds.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    played = [json.loads(line) for line in lines if line.endswith("}")]
    change: dict[str, Any] = dict(SETTINGS)
    faulty = list(components())
    for number in range(ROUNDS):
        if number >= len(played):
            played.append(play(lab, number, options.seed, change, faulty))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(played[-1]) + "\n")
        found = played[number]["findings"]
        print(f"round {number}: {', '.join(each['id'] + ' ' + each['severity'] for each in found) or 'nothing'}")
        if not found:
            return 0
        before = (change, faulty)
        change, faulty = mended(found[0], change, faulty)
        if (change, faulty) == before:
            print(f"  acting on {found[0]['id']} changes nothing: {found[0]['fix'] or 'no setting mends it'}")
            return 1
        print(f"  acted on {found[0]['id']}: {found[0]['fix'] or 'took the faulty component out'}", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(entry.run(main))
