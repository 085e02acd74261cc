"""One training run as its main rank leads it: what is measured, and where the figures go."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors.torch import save_file

from dfu_mlflow.base.adapters import trainable_fraction
from dfu_mlflow.bundle import BundleSource, write_bundle
from dfu_mlflow.checkpoint import weights_file
from dfu_mlflow.conditioning import FED, prompt_length
from dfu_mlflow.config.load import dump_yaml
from dfu_mlflow.config.prompts import resolve_style
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.confirmation import Candidate, group, named, validation_group
from dfu_mlflow.data import dataset_digest, evaluation_pixels
from dfu_mlflow.diagnosis.diagnose import Diagnosis
from dfu_mlflow.diagnosis.report import BUDGET_TAG, diagnosis_section, finding_tags, findings_file
from dfu_mlflow.diagnosis.watch import Watch
from dfu_mlflow.evaluator import Measurement, Observation, folded
from dfu_mlflow.measured_run import MeasuredRun
from dfu_mlflow.participant import Equipment, Look, TrainingResult
from dfu_mlflow.phases import phase
from dfu_mlflow.progress import Console
from dfu_mlflow.ranks import Ranks
from dfu_mlflow.report.album import Album
from dfu_mlflow.report.render import render
from dfu_mlflow.report.training import TrainingStory, training_report
from dfu_mlflow.runtime import provenance
from dfu_mlflow.tracking import Tracker
from dfu_mlflow.trainer import Score
from dfu_mlflow.verdict import success_verdict


class Supervisor(Protocol):
    """Whoever has trainings made, to compare them: `tuning`."""

    run_id: str
    """The MLflow run to write to, made by the supervisor."""
    baselines: dict[str, Measurement]
    """What the untouched base was measured as, by everything that it depends on; filled by the runs."""

    def epoch(self, epoch: int, score: Score | None) -> None:
        """An epoch was evaluated; raises `Pruned` to end the run."""

    def finished(self, run: TrainingRun, result: TrainingResult) -> TrainingResult:
        """Training is over and its run still open; gives back what is to be published."""


class TrainingRun(MeasuredRun):
    """A training run as its main rank sees it: the trainer's hooks, and what they write to."""

    def __init__(
        self,
        config: RunConfig,
        equipment: Equipment,
        tracker: Tracker,
        ranks: Ranks,
        folder: Path,
        supervisor: Supervisor | None = None,
    ) -> None:
        facts = {"run_id": tracker.run_id, "data": dataset_digest(equipment.material.source.split)}
        super().__init__(config, equipment, ranks, folder, facts, {} if supervisor is None else supervisor.baselines)
        self.supervisor = supervisor
        self.tracker = tracker
        for evaluator in (self.evaluator, self.quick):
            if evaluator is not None:
                evaluator.between_batches = self.between_batches
        self.album = Album(folder / "grids", self.material.source.split.classes)
        self.settings_shown: dict[str, str] = {}
        self.console = Console(config.train.epochs, self.trainer.steps_per_epoch, config.evaluation.every_epochs)
        pictures = None if self.plan.quick is None else self.plan.quick.pictures
        self.watch = Watch(config, self.trainer.steps_per_epoch, len(self.material.source.split.classes), pictures)
        self.diagnosis: Diagnosis | None = None
        self.diagnosed = tracker.tag(BUDGET_TAG)  # a resumed run may have been diagnosed since

    def describe(self, digest: str) -> None:
        """Log what the run is, before it does anything."""
        config, pipe, source = self.config, self.material.pipe, self.material.source
        perceptual = config.loss.perceptual_loss
        derived = {
            "prompt_length": prompt_length(pipe, list(source.prompts.values())),
            "prompt_style": resolve_style(config.prompts),
            "guidance_scale": config.sampling.guidance_scale,
            "perceptual_weight": perceptual.weight if perceptual.enabled else 0,
            "method": config.adapter.method,
            "base_model": config.base_model,
            "learning_rate": config.train.learning_rate,
            "resolution_px": config.data.resolution_px,
            "seed": config.seed,
            "trainable_fraction": round(trainable_fraction(pipe.unet, self.parts.weights), 6),
        }
        self.tracker.params(config, derived | self.identities())
        self.settings_shown = {name: str(value) for name, value in derived.items()}
        self.tracker.text("config.yaml", dump_yaml(config))
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(self.parts.conditioner.fed(), self.folder / FED)  # for diagnosis
        hashes = {f"sha256.{part}": digest for part, digest in self.material.digests.items()}
        notes = {f"not_computed.{metric}": reason for metric, reason in self.panels.notes.items()}
        self.tracker.tags(provenance() | hashes | notes | self.watch.facts)
        self.console.say(self.plan.in_words())
        for context, records in {"training": source.split.train, "evaluation": source.split.held_out}.items():
            counts = {label: sum(record.label == label for record in records) for label in source.split.classes}
            self.tracker.dataset(f"photographs-{context}", digest, _origin(config), counts, context)
        if config.tracking.log_real_images:
            self.log_photographs()
        self.console.opening(config, source, derived, self.tracker.run_id)

    def show_draws(self, digests: list[str]) -> None:
        """Log each rank's first draws, for diagnosis."""
        self.tracker.tags({f"draws.rank{rank}": digest for rank, digest in enumerate(digests)})

    def log_photographs(self) -> None:
        """Held-out photographs beside the samples: only where the user asked for it by name."""
        count = self.config.evaluation.grid_per_class
        for label in self.material.source.split.classes:
            records = [record for record in self.material.source.split.held_out if record.label == label][:count]
            pixels = evaluation_pixels(records, self.config.data).numpy()
            self.tracker.image(f"photographs/{label}", 0, folded(np.concatenate(list(pixels), axis=1)))

    def shown(self) -> AbstractContextManager[object]:
        """The bar ends with this block."""
        return closing(self.console)

    def on_step(self, step: int, figures: dict[str, float]) -> None:
        """A step is done: show it, and log every few."""
        self.console.step(step, figures)
        self.watch.rates[step] = figures["step/lr"]
        if step % self.config.tracking.log_every_steps == 0:
            self.tracker.step(step, figures)

    def passed(self, epoch: int, training: dict[str, float]) -> None:
        """An epoch is done that is not evaluated: its losses are logged all the same."""
        self.tracker.epoch(epoch, {"epoch": float(epoch), **training})

    def between_batches(self) -> None:
        """Between two batches of pictures: stop if asked to, else say that the run lives."""
        self.ranks.check()
        self.tracker.beat()

    def before_checkpoint(self) -> None:
        """What the checkpoint covers is stored first; where the store is away, weights are worth more than points."""
        self.tracker.offer()

    def evaluate(self, epoch: int, training: dict[str, float]) -> Score | None:
        """An epoch is done (0: none yet): measure it, log it, and say how good it is."""
        with self.console.evaluating(epoch):
            return super().evaluate(epoch, training)

    def conclude(self, epoch: int, training: dict[str, float], looks: dict[str, Look]) -> Score | None:
        """Measure what was seen, log it, and say how good it is."""
        full: dict[str, Measurement] = {}
        if self.quick is None or self.plan.full(epoch):
            base = self.history.baseline() if epoch > 0 else None
            full = {shown: self.measure(epoch, shown, look.full, base) for shown, look in looks.items()}
        quick = self.measured_quickly(epoch, looks)
        figures = {"epoch": float(epoch), **training}
        for measured, quickly in ((quick, True), (full, False)):
            for shown, measurement in measured.items():
                figures |= named(measurement, shown, quickly)
        figures |= self.movement({shown: look.moved for shown, look in looks.items()})
        best = self.best_score(quick or full)
        self.log_epoch(epoch, figures, full, quick)
        if epoch == 0:
            self.say_if_nothing_chooses(quick or full, full)
        if self.supervisor is not None:
            self.supervisor.epoch(epoch, best)
        return best

    def log_epoch(
        self,
        epoch: int,
        figures: dict[str, float],
        full: dict[str, Measurement],
        quick: dict[str, Measurement],
    ) -> None:
        """Everything an epoch leaves behind; the verdict speaks of its better weights."""
        self.tracker.epoch(epoch, figures)
        for shown, measurement in (quick | full).items():
            self.album.keep(shown, epoch, measurement.grids)
            for label, grid in measurement.grids.items():
                self.tracker.image(f"samples{'' if shown == 'live' else '_ema'}/{label}", epoch, folded(grid))
            groups = (group(shown), group(shown, quick=True), validation_group(shown))
            own = {key: value for key, value in figures.items() if key.split("/")[0] in groups}
            self.tracker.checkpoint(epoch, shown, own)
        self.history.add(epoch, figures, full, quick)
        success = self.config.evaluation.success
        best = self.best_score(full) if full else None
        series = self.history.series_of(success.metric, best.shown if best else "live") if success else {}
        self.tracker.tags({"verdict": success_verdict(success, series, epoch)})
        self.console.epoch(epoch, figures)
        self.diagnose()

    def diagnose(self) -> None:
        """Run the cheap checks on the figures so far; what fires for the first time is said at once."""
        figures = {number: self.history.figures(number) for number in self.history.measured()}
        best = self.trainer.store.best()
        self.diagnosis, news = self.watch.look(figures, str(best["shown"]) if best else None)
        for sentence in news:
            self.console.say(sentence)
        place = findings_file("cheap", self.diagnosed)
        self.tracker.text(place, self.diagnosis.document())
        if place == findings_file("cheap", None):
            self.tracker.tags(finding_tags(self.diagnosis))

    def say_if_nothing_chooses(self, choosing: dict[str, Measurement], full: dict[str, Measurement]) -> None:
        """Where the metric that chooses is not computed, the last checkpoint is what a run ends with."""
        evaluation = self.config.evaluation
        asked = [(choosing, evaluation.best_metric, "the last checkpoint will be taken for the best")]
        if evaluation.success:
            asked.append((full, evaluation.success.metric, "whether the run succeeds cannot be told"))
        for measured, name, then in asked:
            base = measured["live"]
            notes = {name: note for report in base.reports for name, note in report.notes.items()}
            metric = name.partition("_progress")[0]
            if metric not in base.figures and not metric.startswith("val_"):
                why = notes.get(metric) or self.panels.notes.get(metric) or "no extractor of metrics.per_epoch gives it"
                self.console.say(f"{metric} is not computed ({why}): {then}")

    def settle(self, candidate: Candidate, seen: Observation) -> None:
        """Measure and log in full what only had quick figures."""
        epoch, shown = candidate.epoch, candidate.shown
        measurement = self.evaluator.judge(seen, shown, self.history.baseline())
        figures = named(measurement, shown)
        self.tracker.epoch(epoch, figures)
        self.tracker.link(self.tracker.checkpoint(epoch, shown, figures), epoch, figures)
        self.history.amend(epoch, figures)

    def report(self, epoch: int, shown: str, verdict: str) -> None:
        """Write `report.html`, about the checkpoint of this epoch and these weights."""
        story = TrainingStory(
            run_id=self.tracker.run_id,
            epochs={number: self.history.figures(number) for number in self.history.measured()},
            best_epoch=epoch,
            best_weights=shown,
            verdict=verdict,
            grids=self.album.grids(shown),
            settings=self.settings_shown,
            identities=tuple(self.identities().values()),
            notes=self.panels.notes,
            extra=() if self.diagnosis is None else (diagnosis_section(self.diagnosis),),
        )
        self.tracker.text("report.html", render(training_report(story)))

    def finish(self) -> TrainingResult:
        """Export the best checkpoint and say how the run ended."""
        store = self.trainer.store
        best = store.best()
        newest = store.complete()[-1].name
        name, shown = (str(best["checkpoint"]), str(best["shown"])) if best else (newest, "live")
        epoch = int(best["epoch"]) if best else self.history.measured()[-1]
        bundle = self.folder / "sampler"
        shutil.rmtree(bundle, ignore_errors=True)
        file = weights_file(store.folder / name, shown)
        prompts, digests = self.material.source.prompts, self.material.digests
        with phase("writing the sampler"):
            write_bundle(bundle, self.config, BundleSource(file, prompts, self.settings, shown, digests))
        success = self.config.evaluation.success
        series = self.history.series_of(success.metric, shown) if success else {}
        verdict = success_verdict(success, series, self.config.train.epochs)
        self.tracker.tags({"best.epoch": str(epoch), "best.weights": shown, "verdict": verdict})
        self.diagnose()  # once more: the last evaluation may have made other weights the best
        self.report(epoch, shown, verdict)
        quick = tuple(f"{group(each, quick=True)}/" for each in ("live", "ema"))
        figures = {key: value for key, value in self.history.figures(epoch).items() if not key.startswith(quick)}
        return TrainingResult(self.tracker.run_id, self.folder, bundle, epoch, shown, figures, verdict)


def _origin(config: RunConfig) -> str:
    """Where the photographs are, as MLflow is told: a digest of the path, for paths may name people."""
    if config.data.root == "phantom":
        return "phantom"
    place = str(config.data.root or config.data.manifest)
    return f"local:{hashlib.sha256(place.encode()).hexdigest()[:12]}"
