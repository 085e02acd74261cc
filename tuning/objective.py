"""A trial of the training study: the normal training with other settings, judged at its own best guidance."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import optuna
from mlflow import MlflowClient

from dfu_mlflow.bundle import change_settings
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.tuning import TuneConfig
from dfu_mlflow.errors import Pruned, UserError
from dfu_mlflow.evaluator import Measurement
from dfu_mlflow.participant import TrainingResult
from dfu_mlflow.pipeline import run_training
from dfu_mlflow.runtime import release_memory
from dfu_mlflow.trainer import Score
from dfu_mlflow.training_run import TrainingRun
from dfu_mlflow.verdict import larger_is_better
from tuning.guidance import GuidancePoint, best_point, curve_page, sweep
from tuning.outcome import Outcome
from tuning.space import Values, with_values
from tuning.summary import SCORED

CURVE = "guidance_curve.html"
SETUP = "setup_s"
"""Of a trial's run: from its start to the base's figures, before the first step. Later trials find the photographs
encoded, and the base measured by the process's first one."""


class TrainingObjective:
    """Trains for each trial.

    Args:
        config: what every trial starts from; `config.tune` says how long each trains and what it is judged by.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = trial_config(config)
        self.tune = config.tune
        self.names: tuple[str, ...] = (config.evaluation.best_metric,)
        self.baselines: dict[str, Measurement] = {}

    def __call__(self, trial: optuna.Trial, values: Values, run_id: str) -> Outcome:
        """Train, sweep guidance, and keep of the files what drawing needs."""
        release_memory()  # of a trial that was ended: its traceback is gone by now
        config = with_values(self.config, values)
        supervisor = TrialSupervisor(trial, config, self.tune, run_id, self.baselines)
        folder = config.output_dir / run_id[:8]
        trial.set_user_attr("folder", str(folder.resolve()))
        try:
            result = run_training(config, supervisor=supervisor)
        finally:
            # A full checkpoint of SDXL with its optimizer is 30 GB, and a study holds many.
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            release_memory()
        return supervisor.outcome(result)


def trial_config(config: RunConfig) -> RunConfig:
    """What a study's trainings have in common.

    Raises:
        UserError: for a metric that is not of pictures, or a combination that cannot be trained.
    """
    tune = config.tune
    if config.evaluation.best_metric.startswith("val_"):
        raise UserError(
            f"--evaluation.best_metric {config.evaluation.best_metric} does not change with guidance, and tune judges "
            "every training at its own best guidance: name a figure of the pictures, such as kid or fd"
        )
    change: Values = {"resume": "none", "evaluation.budget": None}  # tune.samples is what a trial is judged by
    asked = {
        "train.epochs": tune.epochs,
        "train.steps_per_epoch": tune.steps_per_epoch,
        "evaluation.samples": tune.samples,
    }
    change |= {name: value for name, value in asked.items() if value is not None}
    return with_values(config.model_copy(update={"tune": TuneConfig()}), change)


class TrialSupervisor:
    """Reports each epoch to the study, ends what is behind, and judges what is trained.

    Args:
        trial: of the study.
        config: the training's.
        tune: the study's.
        run_id: the trial's MLflow run.
        baselines: shared by the trials of a process.
    """

    def __init__(
        self,
        trial: optuna.Trial,
        config: RunConfig,
        tune: TuneConfig,
        run_id: str,
        baselines: dict[str, Measurement],
    ) -> None:
        self.trial = trial
        self.config = config
        self.tune = tune
        self.run_id = run_id
        self.baselines = baselines
        self.metric = config.evaluation.best_metric
        self.started = time.perf_counter()
        self.best: GuidancePoint | None = None
        self.scored = 0
        self.curve: list[GuidancePoint] = []

    def epoch(self, epoch: int, score: Score | None) -> None:
        """Report the epoch's figure; the last epoch is not worth ending.

        Raises:
            Pruned: when the pruner says so.
            UserError: for a metric that is not computed.
        """
        if epoch == 0:
            MlflowClient().log_metric(self.run_id, SETUP, time.perf_counter() - self.started)
            return
        if score is None:
            raise UserError(
                f"--evaluation.best_metric {self.metric} was not computed, so that trials cannot be compared: "
                "name a figure that training shows under eval/, such as kid or fd"
            )
        value = -score.value if larger_is_better(self.metric) else score.value
        self.trial.report(value, epoch)
        if epoch < self.config.train.epochs and self.trial.should_prune():
            raise Pruned(
                f"after epoch {epoch} of {self.config.train.epochs}: {self.metric} {value:.4g} is behind other trials"
            )

    def finished(self, run: TrainingRun, result: TrainingResult) -> TrainingResult:
        """Sweep guidance on the best checkpoint and make its best value the sampler's default.

        Raises:
            UserError: where nothing was trained.
        """
        if result.bundle is None or not result.best_epoch:
            raise UserError("nothing was trained: --tune.epochs must be 1 or more")
        require_one_identity(self.trial.study, [panel.reference.identity for panel in run.panels.panels])
        series = [run.history.series(f"{group}/{self.metric}") for group in ("eval", "eval_ema")]
        self.scored = sum(epoch > 0 for figures in series for epoch in figures)
        guidance = sorted({*self.tune.guidance, self.config.sampling.guidance_scale})
        self.curve = sweep(run, result.bundle, result.shown, guidance)
        self.best = best_point(self.curve, self.metric)
        change_settings(result.bundle, replace(run.settings, guidance_scale=self.best.guidance))
        for point in self.curve:
            shown = {f"guidance/{name}": point.figures[name] for name in self.figures_shown(point)}
            run.tracker.epoch(round(100 * point.guidance), shown)
        run.tracker.text(CURVE, curve_page({f"trial {self.trial.number}": self.curve}, self.metric))
        run.tracker.tags({"best.guidance_scale": self.best.guidance})
        group = "eval" if result.shown == "live" else "eval_ema"
        return replace(
            result, figures=result.figures | {f"{group}/{name}": value for name, value in self.best.figures.items()}
        )

    def figures_shown(self, point: GuidancePoint) -> list[str]:
        """What of a point goes into the run's curves: the headline figures of all classes together."""
        wanted = {self.metric, f"{self.metric}_low", f"{self.metric}_high"} | {"kid", "fd", "fid", "coverage"}
        wanted |= {"saturation", "saturation_w1", "class_accuracy"}
        return sorted(wanted & point.figures.keys())

    def outcome(self, result: TrainingResult) -> Outcome:
        """The trial's figure, and what registering its checkpoint needs."""
        assert self.best is not None
        facts = {
            "guidance_scale": self.best.guidance,
            "curve": [[point.guidance, *point.with_interval(self.metric)] for point in self.curve],
            SCORED: self.scored,
            "best_epoch": result.best_epoch,
            "shown": result.shown,
            "figures": {key: value for key, value in result.figures.items() if key.startswith(("eval", "val"))},
            "verdict": result.verdict,
            "bundle": str(Path(str(result.bundle)).resolve()),
        }
        value, low, high = self.best.with_interval(self.metric)
        return Outcome((value,), {} if low is None or high is None else {self.metric: (low, high)}, facts)


def require_one_identity(study: optuna.Study, identities: list[str]) -> None:
    """Figures of different metric identity are never compared: a trial's must be the study's.

    Raises:
        UserError: for a trial that is measured otherwise.
    """
    known = study.user_attrs.get("metric_identity")
    if known is None:
        study.set_user_attr("metric_identity", identities)
    elif list(known) != identities:
        raise UserError(
            f"this trial is measured otherwise than the study's first ({identities[0]} instead of {known[0]}): take "
            "what changes photographs or metrics out of tune.space, or give another --tune.study"
        )
