"""What is at hand about a run. Anything may be missing, with a reason; a check that needs it then says so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from dfu_mlflow.diagnosis.bench import Bench
from dfu_mlflow.diagnosis.lacking import Lacking

Curves = Mapping[str, Mapping[int, float]]
"""Metric name -> step (or epoch) -> value."""
DRAWS = "draws.rank"
"""Tags `draws.rank0`, `draws.rank1` ...: a digest of each rank's first draws."""
STEPS_TAG = "steps_per_epoch"
"""Tag: optimizer steps an epoch as the run counts them, which the configuration may leave to the data."""
BEST_WEIGHTS_TAG = "best.weights"
"""Tag: `live` or `ema`, which weights of the best checkpoint were better."""
CLASSES_TAG = "classes"
"""Tag: how many classes the run's photographs have."""
PICTURES_TAG = "quick.pictures"
"""Tag: pictures of a quick evaluation, where a run has such."""
GROUPS = MappingProxyType({"eval": "eval_quick", "eval_ema": "eval_quick_ema"})
"""What figures of full evaluations are logged under, and those of quick ones."""


@dataclass(frozen=True)
class Life:
    """Whether the run's process is still there.

    Attributes:
        status: MLflow's, such as RUNNING.
        silent_s: seconds since it last gave a sign of life.
    """

    status: str
    silent_s: float


@dataclass(frozen=True)
class Case:
    """One run under examination.

    Attributes:
        name: as the user called it.
        settings: dotted key -> value, only what is known: all of them for a run of this project, for a foreign one
            what its own configuration says.
        curves: what was logged while it ran; with more quick evaluations than full ones `eval/...` are the quick ones'.
        tags: MLflow's, or none.
        life: None for what is no MLflow run.
        bench: base, data, weights and pictures, loaded when asked for.
        lacking: part -> why it is not at hand.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    life: Life | None = None
    bench: Bench | None = None
    lacking: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "curves", comparable(self.curves))

    def setting(self, key: str) -> Any:
        """The value of a setting.

        Raises:
            Lacking: where the run's configuration does not say.
        """
        if key not in self.settings:
            raise Lacking(self.lacking.get("config", f"the configuration does not say {key}"))
        return self.settings[key]

    def curve(self, *names: str) -> list[tuple[int, float]]:
        """Finite points of the first of these metrics that was logged, in order; `nonfinite` looks at the others.

        Raises:
            Lacking: where none was.
        """
        for name in names:
            points = [point for point in sorted(self.curves.get(name, {}).items()) if math.isfinite(point[1])]
            if points:
                return points
        raise Lacking(self.lacking.get("curves", f"no finite {' or '.join(names)} was logged"))

    def last(self, *names: str) -> float:
        """Last value of such a metric; raises as `curve`."""
        return self.curve(*names)[-1][1]

    def updates(self) -> int:
        """Optimizer updates done: as logged, else as the checkpoint says, else as configured.

        Raises:
            Lacking: where none of them tells.
        """
        if "step/loss" in self.curves:
            return max(self.curves["step/loss"])
        if self.bench is not None and self.bench.updates is not None:
            return self.bench.updates
        return self.planned()

    def planned(self) -> int:
        """Optimizer updates of the whole run.

        Raises:
            Lacking: where nothing tells.
        """
        if "train.total_steps" in self.settings:
            return int(self.settings["train.total_steps"])
        return self.steps_per_epoch() * int(self.setting("train.epochs"))

    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch: as the run tells, else as configured.

        Raises:
            Lacking: where neither tells.
        """
        told = self.tags.get(STEPS_TAG) or self.settings.get("train.steps_per_epoch")
        if not told:
            raise Lacking("neither the run nor its configuration say how many steps an epoch has")
        return int(told)

    def classes(self) -> int:
        """Number of classes: as the run tells, else as the photographs or the written prompts do.

        Raises:
            Lacking: where none of them tells.
        """
        if CLASSES_TAG in self.tags:
            return int(self.tags[CLASSES_TAG])
        if self.bench is not None:
            return len(self.bench.split.classes)
        prompts = self.settings.get("prompts.phase_prompts")
        if prompts:
            return len(prompts)
        raise Lacking("nothing says how many classes there are (tag classes, photographs or prompts.phase_prompts)")

    def ranks(self) -> int:
        """Processes that trained together: as configured, or as many as told their draws, whichever is more.

        Raises:
            Lacking: where nothing tells.
        """
        told = sum(name.startswith(DRAWS) for name in self.tags)
        if "runtime.num_processes" in self.settings:
            return max(int(self.settings["runtime.num_processes"]), told)
        if told:
            return told
        raise Lacking("neither draws by rank nor the number of processes are known")

    def ready(self) -> Bench:
        """Base, data, weights and pictures.

        Raises:
            Lacking: where probes were not asked for.
        """
        if self.bench is None:
            raise Lacking(self.lacking.get("bench", "neither base nor checkpoint is at hand"))
        return self.bench


def comparable(curves: Curves) -> Curves:
    """Curves in which `eval/...` is of one kind of evaluation: of the quick ones where these have more points.

    The two are measured on different numbers of pictures and are never mixed.
    """
    prefix = f"{GROUPS['eval']}/"
    quick_points = {name.removeprefix(prefix): len(curves[name]) for name in curves if name.startswith(prefix)}
    if not any(count > len(curves.get(f"eval/{name}", {})) for name, count in quick_points.items()):
        return curves
    full = tuple(f"{group}/" for group in GROUPS)
    kept = {name: points for name, points in curves.items() if not name.startswith(full)}
    for group, quick in GROUPS.items():
        kept |= {
            f"{group}/{name.removeprefix(f'{quick}/')}": points
            for name, points in curves.items()
            if name.startswith(f"{quick}/")
        }
    return kept
