"""A trial of the sampling study: pictures of one frozen checkpoint under other sampling settings, nothing trained."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import optuna
import torch
from mlflow import MlflowClient

from dfu_mlflow.bundle_format import Settings
from dfu_mlflow.config import RunConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.evaluator import Evaluator, Panel, assess, extract, flatten_reports
from dfu_mlflow.metrics.catalogue import ALWAYS, METRICS, figure_names
from dfu_mlflow.objective import Objective as TrainingLoss
from dfu_mlflow.panels import build_panels
from dfu_mlflow.preparation import Material, prepare, read_source
from dfu_mlflow.ranks import Ranks
from dfu_mlflow.sampling import Sampler
from dfu_mlflow.sightings import check_subject
from dfu_mlflow.subject import open_subject
from registry.source import locate
from tuning.objective import require_one_identity
from tuning.outcome import Outcome
from tuning.space import Values, with_values

SECONDS = "seconds_per_image"
DEFAULT = ("kid", "coverage", "saturation_w1", SECONDS)
WARM_UP = 2
TIMED_ON = "timed_on"
"""Of a study: the device that its times are of."""


class SamplingObjective:
    """Draws with one checkpoint; base, photographs' features and the checkpoint are loaded once.

    Args:
        config: photographs and metrics of the checkpoint; `config.tune` names it.
        check_stop: called between batches; raises to stop.

    Raises:
        UserError: for a source that does not draw, or an objective that is no figure.
    """

    def __init__(self, config: RunConfig, check_stop: Callable[[], None]) -> None:
        self.names: tuple[str, ...] = config.tune.objectives or DEFAULT
        config = with_values(
            config,
            {
                "metrics.per_epoch": extractors_of(self.names),
                "evaluation.samples": config.tune.samples_per_setting,
                "evaluation.grid_per_class": 1,
            },
        )
        material = prepare(config, read_source(config))
        subject = open_subject(locate(config.tune.source).folder, config, material)
        check_subject(config, material, subject)
        if subject.sampler is None:
            raise UserError(f"--tune.source {config.tune.source} is a folder of pictures: give a model that draws")
        self.config, self.shown, self.sampler = config, subject.shown, subject.sampler
        self.panels = build_panels(config, material)
        missing = [name for name in self.names if name in self.panels.notes]
        if missing:
            reasons = "; ".join(f"{name}: {self.panels.notes[name]}" for name in missing)
            raise UserError(f"--tune.objectives cannot be computed: {reasons}")
        self.evaluator = _evaluator(config, material, self.sampler, self.panels.panels, check_stop)
        self.sampler.draw([self.sampler.classes[0]] * WARM_UP, list(range(WARM_UP)))

    def __call__(self, trial: optuna.Trial, values: Values, run_id: str) -> Outcome:
        """Draw and measure."""
        panels = self.panels.panels
        require_one_identity(trial.study, [panel.reference.identity for panel in panels])
        if SECONDS in self.names:
            require_one_machine(trial.study, self.evaluator.material.device)
        settings = tuned(self.sampler.settings, values)
        started = time.perf_counter()
        drawn = self.evaluator.draw(self.sampler.batch_size, settings)
        seconds = (time.perf_counter() - started) / len(drawn.images)
        reports = assess(panels, drawn, extract(panels, drawn, Ranks()), None, self.shown)
        figures = flatten_reports(reports) | {SECONDS: seconds}
        client = MlflowClient()
        for name in self.names:
            client.log_metric(run_id, name if name == SECONDS else f"eval/{name}", figures[name])
        intervals = {
            name: (figures[f"{name}_low"], figures[f"{name}_high"]) for name in self.names if f"{name}_low" in figures
        }
        return Outcome(tuple(figures[name] for name in self.names), intervals)


def require_one_machine(study: optuna.Study, device: torch.device) -> None:
    """Times of different machines are never compared: a trial's must be of the study's.

    Raises:
        UserError: for a worker on another kind of device.
    """
    cpu = f"a CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    known = study.user_attrs.get(TIMED_ON)
    if known is None:
        study.set_user_attr(TIMED_ON, here)
    elif known != here:
        raise UserError(
            f"{SECONDS} is an objective, the study's first worker measured it on {known}, and this one runs on {here}: "
            f"start it on the same, or name --tune.objectives without {SECONDS} in another --tune.study"
        )


def tuned(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Settings with a trial's values in their place."""
    return replace(settings, **{name.removeprefix("sampling."): value for name, value in values.items()})


def extractors_of(names: tuple[str, ...]) -> list[str]:
    """The extractors whose features give these figures.

    Raises:
        UserError: for a name that no extractor gives.
    """
    given = figures_by_extractor()
    known = {figure for figures in given.values() for figure in figures}
    unknown = [name for name in names if name not in known | {SECONDS}]
    if unknown:
        raise UserError(
            f"--tune.objectives {', '.join(unknown)}: unknown; a sampling study knows {', '.join(sorted(known))}, "
            f"{SECONDS}"
        )
    return [extractor for extractor, figures in given.items() if set(names) & set(figures)] or ["efficientnet_lite0"]


def figures_by_extractor() -> Mapping[str, tuple[str, ...]]:
    """Extractor -> names of the figures it gives after each epoch."""
    found = {}
    for extractor, metrics in ALWAYS.items():
        names = figure_names(extractor, metrics)
        found[extractor] = tuple(names.get(figure, figure) for metric in metrics for figure in METRICS[metric].figures)
    return found


def _evaluator(
    config: RunConfig, material: Material, sampler: Sampler, panels: tuple[Panel, ...], check_stop: Callable[[], None]
) -> Evaluator:
    own = replace(material, pipe=sampler.pipe, conditioner=sampler.conditioner)
    loss = TrainingLoss(dict(sampler.pipe.scheduler.config), config.loss, None)
    ranks = Ranks(check_stop)
    return Evaluator(own, loss, sampler.settings, panels, config.evaluation, ranks, lambda: sampler.unet)
