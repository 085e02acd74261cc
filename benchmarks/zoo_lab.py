"""Where the zoo's runs are made: small real trainings, copies of their records, and what `diagnose` says of them."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.artifacts import load_text
from mlflow.entities import Metric, Param, RunTag

from dfu_mlflow.config import RunConfig, load
from dfu_mlflow.config.load import merge, validate
from dfu_mlflow.diagnosis.diagnose import Diagnosis, diagnose
from dfu_mlflow.errors import Interrupted
from dfu_mlflow.evaluator import Measurement
from dfu_mlflow.pipeline import run_training
from dfu_mlflow.tracking import HEARTBEAT_TAG
from dfu_mlflow.tracking_store import logged_points, prepare_store
from dfu_mlflow.trainer import Score
from dfu_mlflow.training_run import TrainingResult, TrainingRun
from registry.diagnose import build_case
from registry.told import DiagnoseOptions, tell_of_run

SMALL: Mapping[str, Any] = {
    "data.phantom.patients": 40,
    "train.epochs": 2,
    "train.steps_per_epoch": 40,
    "train.batch_size": 8,
    "train.warmup_steps": 8,
    "sampling.num_inference_steps": 6,
    "evaluation.budget": None,
    "evaluation.samples": 36,
    "evaluation.grid_per_class": 1,
    "evaluation.validation_images": 32,
    "evaluation.validation_timesteps": 4,
    "evaluation.ema": False,
    "metrics.per_epoch": ["efficientnet_lite0", "colour"],
    "memorisation.membership_images": 40,
    "checkpoint.keep_last": 1,
    "tracking.log_every_steps": 1,
    "tracking.system_metrics": False,
}
"""The preset `tiny`, as small as the checks still work on: 80 updates, 60 held-out photographs."""

Patch = Callable[[], AbstractContextManager[None]]
"""Puts a faulty component in place of a sound one, for the time of a training."""


@dataclass(frozen=True)
class Exhibit:
    """What is handed to `diagnose`: a run, and a folder of pictures instead of its own."""

    run_id: str
    images: Path | None = None


@dataclass(frozen=True)
class Injection:
    """How a fault gets into an otherwise healthy run.

    Attributes:
        change: settings of the training, dotted key -> value.
        patches: faulty components around it.
        doctored: (lab, seed) -> exhibit made from the seed's healthy run; no training of its own.
    """

    change: Mapping[str, Any] = field(default_factory=dict)
    patches: tuple[Patch, ...] = ()
    doctored: Callable[[Lab, int], Exhibit] | None = None

    def __add__(self, other: Injection) -> Injection:
        """Both at once."""
        return Injection({**self.change, **other.change}, self.patches + other.patches)


class Shared:
    """Names the MLflow run, and keeps what the untouched base was measured as for the next run."""

    def __init__(self, run_id: str, baselines: dict[str, Measurement]) -> None:
        self.run_id = run_id
        self.baselines = baselines

    def epoch(self, epoch: int, score: Score | None) -> None:
        """Nothing to end a run for."""

    def finished(self, run: TrainingRun, result: TrainingResult) -> TrainingResult:
        """Nothing to add."""
        return result


class Lab:
    """A folder with a tracking store, a cache and everything that the runs write.

    Args:
        folder: made where it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cache = self.folder / "cache"
        self.baselines: dict[str, Measurement] = {}
        mlflow.set_tracking_uri(f"sqlite:///{self.folder}/mlflow.db")
        prepare_store()
        self.client = MlflowClient()
        known = self.client.get_experiment_by_name("zoo")
        place = (self.folder / "artifacts").as_uri()
        self.experiment = str(known.experiment_id if known else self.client.create_experiment("zoo", place))

    def config(self, seed: int, change: Mapping[str, Any]) -> RunConfig:
        """The small run with some settings changed; a seed is another clinic as well."""
        own = {
            "seed": seed,
            "data.phantom.seed": seed,
            "device": "cpu",
            "output_dir": str(self.folder / "runs"),
            "data.cache_dir": str(self.cache),
        }
        tree = load(RunConfig, "tiny", []).model_dump(mode="json")
        for key, value in {**SMALL, **own, **change}.items():
            tree = merge(tree, nested(key, value))
        return validate(RunConfig, tree)

    def train(self, seed: int, injection: Injection, name: str) -> str:
        """Train, and give back the run's id however it ended; what a fault breaks is part of its record."""
        run_id = str(self.client.create_run(self.experiment, run_name=name).info.run_id)
        config = self.config(seed, injection.change)
        with ExitStack() as stack:
            for patch in injection.patches:
                stack.enter_context(patch())
            try:
                run_training(config, supervisor=Shared(run_id, {} if injection.patches else self.baselines))
            except Interrupted:
                raise
            except Exception as error:  # any: it is what `diagnose` is to explain
                print(f"  {name} ended with {type(error).__name__}: {' '.join(str(error).split())[:120]}")
        return run_id

    def healthy(self, seed: int) -> str:
        """The seed's healthy run, trained once for all faults that need no training of their own."""
        kept = self.folder / f"healthy-{seed}.txt"
        if not kept.is_file():
            kept.write_text(self.train(seed, Injection(), f"healthy {seed}"), encoding="utf-8")
        return kept.read_text(encoding="utf-8")

    def is_shared(self, run_id: str) -> bool:
        """Is it a seed's healthy run, that other faults start from?"""
        return any(kept.read_text(encoding="utf-8") == run_id for kept in self.folder.glob("healthy-*.txt"))

    def twin(self, run_id: str, keep: Callable[[str, int], bool], tags: Mapping[str, str]) -> str:
        """A copy of a run's record and folder, with points left out and tags changed; it is RUNNING at first."""
        run = self.client.get_run(run_id)
        twin = str(self.client.create_run(self.experiment, run_name=f"twin of {run_id[:8]}").info.run_id)
        points = [
            Metric(name, value, stamp, step)
            for name, steps in logged_points(self.client, run_id).items()
            for step, (stamp, value) in steps.items()
            if keep(name, step)
        ]
        kept = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")}
        for start in range(0, len(points), 500):
            self.client.log_batch(twin, metrics=points[start : start + 500])
        params = [Param(key, value) for key, value in run.data.params.items()]
        for start in range(0, len(params), 90):
            self.client.log_batch(twin, params=params[start : start + 90])
        self.client.log_batch(twin, tags=[RunTag(key, value) for key, value in {**kept, **tags}.items()])
        self.client.log_text(twin, load_text(f"{run.info.artifact_uri}/config.yaml"), "config.yaml")
        shutil.copytree(self.folder / "runs" / run_id[:8], self.folder / "runs" / twin[:8])
        return twin

    def drop_tag(self, run_id: str, name: str) -> None:
        """Take a tag away, where it is there."""
        if name in self.client.get_run(run_id).data.tags:
            self.client.delete_tag(run_id, name)

    def end(self, run_id: str, status: str) -> None:
        """Give a twin its status."""
        self.client.update_run(run_id, status)

    def diagnose(self, exhibit: Exhibit) -> tuple[Diagnosis, dict[str, float]]:
        """What a user's `diagnose` says at the full budget, and each check's processor seconds."""
        options = DiagnoseOptions(run=exhibit.run_id, images=exhibit.images)
        case = build_case(options, tell_of_run(exhibit.run_id), {})
        marks: list[tuple[str, float]] = []
        diagnosis = diagnose(case, "full", lambda check: marks.append((check, time.process_time())))
        marks.append(("end", time.process_time()))
        spent = {check: round(later - at, 1) for (check, at), (_, later) in itertools.pairwise(marks)}
        return diagnosis, {check: seconds for check, seconds in spent.items() if seconds >= 0.5}

    def clear(self, run_id: str) -> None:
        """Remove a run's checkpoints: they are large, and the journal holds what was found."""
        shutil.rmtree(self.folder / "runs" / run_id[:8], ignore_errors=True)


def silent_since(seconds: float) -> dict[str, str]:
    """The heartbeat of a process that has been gone for so long."""
    return {HEARTBEAT_TAG: str(round(time.time() - seconds))}


def nested(key: str, value: Any) -> dict[str, Any]:
    """`a.b` and a value -> a tree."""
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return dict(tree)
