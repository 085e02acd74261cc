"""The runs of a factorial study: the normal training, sampled at every combination of the sampled factors."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dfu_mlflow.bundle_format import Settings
from dfu_mlflow.config import RunConfig, flatten
from dfu_mlflow.config.study import WEIGHTS, Plan
from dfu_mlflow.config.tuning import is_fixed
from dfu_mlflow.documents import FORMAT, read_document
from dfu_mlflow.errors import ConfigError
from dfu_mlflow.evaluator import Measurement, assess, extract, flatten_reports
from dfu_mlflow.participant import TrainingResult
from dfu_mlflow.ranks import Ranks
from dfu_mlflow.trainer import Score
from dfu_mlflow.training_run import TrainingRun
from tuning.ablation.design import Cell, Factor, cells
from tuning.ablation.effects import Observation
from tuning.space import with_values

SAMPLING = "sampling."
SEED = "seed"
NAME_CHARACTERS = 60
NAME = re.compile(rf"\w[\w.\- :]{{0,{NAME_CHARACTERS - 1}}}")
"""MLflow takes letters, digits, blanks and _-.:/ in the names of metrics and tags, 250 characters at most."""
JOURNAL = "study.json"


@dataclass(frozen=True)
class Experiment:
    """A plan laid over a configuration.

    Attributes:
        plan: as the user wrote it.
        config: what every run starts from.
        factors: in the plan's order.
    """

    plan: Plan
    config: RunConfig
    factors: tuple[Factor, ...]

    @property
    def trained(self) -> list[Factor]:
        """Factors that need a training for each level."""
        return [factor for factor in self.factors if not factor.sampled]

    @property
    def sampled(self) -> list[Factor]:
        """Factors that do not."""
        return [factor for factor in self.factors if factor.sampled]

    def runs(self) -> list[tuple[dict[str, str], int]]:
        """(levels of the trained factors, seed) of every training, seed by seed: an early stop leaves whole repeats."""
        return [(cell, seed) for seed in self.plan.seeds for cell in cells(self.trained, self.plan.fraction)]

    def configuration(self, cell: Cell, seed: int) -> RunConfig:
        """What one training is configured by.

        Raises:
            ConfigError: for settings that do not exist or do not go together.
        """
        values: dict[str, Any] = {"evaluation.budget": None} | dict(self.plan.common)
        for name, level in cell.items():
            values |= self.plan.factors[name][level]
        folder = self.config.output_dir / folder_name(cell, seed)
        return with_values(self.config, values | {"seed": seed, "resume": "latest", "output_dir": str(folder)})


def folder_name(cell: Cell, seed: int) -> str:
    """Of one training, below the study's folder."""
    return "-".join([*cell.values(), f"seed{seed}"])


def lay_out(plan: Plan, config: RunConfig) -> Experiment:
    """Name the factors' levels and try every combination on the configuration.

    Raises:
        ConfigError: listing every name that cannot be used, setting that must not vary, and combination that cannot be
            configured.
    """
    if problems := [*_bad_names(plan), *_bad_settings(plan)]:
        raise ConfigError(problems)
    factors = []
    for name, levels in plan.factors.items():
        low, high = levels
        settings = {key for level in levels.values() for key in level}
        sampled = all(key == WEIGHTS or key.startswith(SAMPLING) for key in settings)
        if WEIGHTS in settings and not sampled:
            raise ConfigError([f"factor {name}: weights cannot change together with what needs a training"])
        factors.append(Factor(name, low, high, sampled))
    experiment = Experiment(plan, config, tuple(factors))
    names = [folder_name(cell, 0) for cell in cells(experiment.trained)]
    problems += [
        f"two combinations of levels are both called {name}: name the levels otherwise"
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    for cell in cells(factors):
        values = {name: level for name, level in cell.items() if WEIGHTS not in plan.factors[name][level]}
        try:
            experiment.configuration(values, plan.seeds[0])
        except ConfigError as error:
            problems += [f"{' '.join(f'{k}={v}' for k, v in values.items())}: {text}" for text in error.problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return experiment


def _bad_names(plan: Plan) -> list[str]:
    """Names become folders and names of MLflow's metrics and tags; an interaction's is made of two."""
    names = [*plan.factors, *(level for levels in plan.factors.values() for level in levels)]
    problems = [
        f"plan: {name!r} cannot name a factor or a level: give a letter or digit, then letters, digits, blanks and "
        f"_.-: , {NAME_CHARACTERS} characters at most"
        for name in names
        if not NAME.fullmatch(name)
    ]
    if SEED in plan.factors:
        problems.append(f"plan: no factor may be called {SEED}: every combination is trained for each of the seeds")
    return problems


def _bad_settings(plan: Plan) -> list[str]:
    """Runs that are measured otherwise cannot be compared; and what is sampled alone is what a sampler knows."""
    settings = {key for levels in plan.factors.values() for level in levels.values() for key in level}
    problems = [
        f"plan: --{key} must be the same in every run: take it out of factors" for key in settings if is_fixed(key)
    ]
    known = {f"{SAMPLING}{name}" for name in Settings.__dataclass_fields__}
    problems += [f"plan: --{key} is no setting of the sampler" for key in settings - known if key.startswith(SAMPLING)]
    overwritten = sorted({SEED, "output_dir", "resume"} & plan.common.keys())
    return sorted(problems) + [f"plan: common.{key} is set by the study itself: take it out" for key in overwritten]


@dataclass
class CellSupervisor:
    """Samples a finished training at every combination of the sampled factors.

    Attributes:
        experiment: the study.
        cell: levels of the trained factors.
        run_id: the training's MLflow run.
        baselines: the untouched base's figures, shared by the runs of a process.
        samplings: (levels of the sampled factors, figures), filled when training is over.
    """

    experiment: Experiment
    cell: Cell
    run_id: str
    baselines: dict[str, Measurement]
    samplings: list[tuple[dict[str, str], dict[str, float]]] = field(default_factory=list)

    def epoch(self, epoch: int, score: Score | None) -> None:
        """Nothing is ended early: a factorial needs all of its cells."""

    def finished(self, run: TrainingRun, result: TrainingResult) -> TrainingResult:
        """The weights of the last step, not of the best epoch: picking the best would be one more factor."""
        base, panels = run.history.baseline(), run.panels.panels
        for sampling in cells(self.experiment.sampled):
            run.ranks.check()
            shown, settings = self._sampled_as(sampling, run.settings)
            with run.weights_of(shown):
                run.parts.unet.eval()
                drawn = run.evaluator.draw(run.config.sampling.batch_size, settings)
            reports = assess(panels, drawn, extract(panels, drawn, Ranks()), base.reports if base else None, shown)
            self.samplings.append((sampling, flatten_reports(reports)))
        return result

    def _sampled_as(self, sampling: Cell, settings: Settings) -> tuple[str, Settings]:
        values: dict[str, Any] = {}
        for name, level in sampling.items():
            values |= self.experiment.plan.factors[name][level]
        shown = str(values.pop(WEIGHTS, "live"))
        checked = with_values(self.experiment.config, values).sampling  # 3 for "3", a pair for a list
        wanted = {key.removeprefix(SAMPLING): getattr(checked, key.removeprefix(SAMPLING)) for key in values}
        return shown, replace(settings, **{key: value for key, value in wanted.items() if value is not None})


class Journal:
    """What was measured so far, on disk: a study that was killed goes on where it was.

    Args:
        folder: of the study.
        facts: what the study is; another study's folder is refused.

    Raises:
        ConfigError: for a folder of another study.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.path = folder / JOURNAL
        facts = json.loads(json.dumps(facts))
        fresh: dict[str, Any] = {"format": FORMAT, "facts": facts, "parent": None, "runs": []}
        known = read_document(self.path, "study") if self.path.is_file() else fresh
        defaults = json.loads(json.dumps({key: flatten(RunConfig()).get(key) for key in facts["config"]}))
        known["facts"]["config"] = defaults | known["facts"].get("config", {})  # a setting may be newer than the study
        if known["facts"] != facts:
            raise ConfigError([f"{folder} holds another study (other plan or settings): give another --output_dir"])
        self.content = known

    def done(self, cell: Cell, seed: int) -> bool:
        """Was this training measured, or did it fail for good?"""
        entry = self.entry(cell, seed)
        return entry is not None and ("samplings" in entry or "failed" in entry)

    def entry(self, cell: Cell, seed: int) -> dict[str, Any] | None:
        """What is known of a training."""
        found = [one for one in self.content["runs"] if one["cell"] == dict(cell) and one["seed"] == seed]
        return found[0] if found else None

    def begin(self, cell: Cell, seed: int, run_id: str) -> None:
        """A training starts."""
        self.content["runs"].append({"cell": dict(cell), "seed": seed, "run_id": run_id})
        self.save()

    def end(self, cell: Cell, seed: int, **facts: Any) -> None:
        """A training is over: its `samplings`, or why it `failed`."""
        entry = self.entry(cell, seed)
        assert entry is not None
        entry |= facts
        self.save()

    def forget(self, runs: Sequence[tuple[Cell, int]]) -> None:
        """Let these trainings be tried again: they failed for a reason that is not theirs."""
        for cell, seed in runs:
            entry = self.entry(cell, seed)
            assert entry is not None
            del entry["failed"]
        self.save()

    def save(self) -> None:
        """Written beside the old one, then renamed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
        beside.replace(self.path)

    def observations(self, headline: str) -> list[Observation]:
        """One figure of everything that was measured."""
        return [
            Observation(entry["cell"] | sampling, entry["seed"], figures[headline])
            for entry in self.content["runs"]
            for sampling, figures in entry.get("samplings", ())
            if headline in figures
        ]

    def failures(self) -> Sequence[dict[str, Any]]:
        """Trainings that ended without a figure."""
        return [entry for entry in self.content["runs"] if "failed" in entry]
