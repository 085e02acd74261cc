"""One evaluation: photographs -> panels -> pictures of the base and of the subject -> MLflow and report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dfu_mlflow.config.load import dump_yaml
from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.data import dataset_digest
from dfu_mlflow.errors import UserError
from dfu_mlflow.evaluator import flatten, folded
from dfu_mlflow.interrupt import StopRequest
from dfu_mlflow.memorisation import MemorisationProbe, membership
from dfu_mlflow.memory import check_output_folder
from dfu_mlflow.memory_limits import require_memory
from dfu_mlflow.memory_phases import evaluation_memory
from dfu_mlflow.metrics.comparison import Comparison
from dfu_mlflow.metrics.extractors.files import Unavailable
from dfu_mlflow.metrics.extractors.sscd import sscd
from dfu_mlflow.panels import build_panels
from dfu_mlflow.photograph_features import Features
from dfu_mlflow.preparation import Material, prepare, read_source
from dfu_mlflow.ranks import Ranks
from dfu_mlflow.report.document import Section
from dfu_mlflow.report.evaluation import EvaluationStory, evaluation_report
from dfu_mlflow.report.findings import memorisation_section, utility_section
from dfu_mlflow.report.render import render
from dfu_mlflow.runtime import make_current, pick_device, provenance
from dfu_mlflow.sightings import Observer, Sighting, check_subject
from dfu_mlflow.subject import Subject
from dfu_mlflow.tracking import Tracker, masked, track
from dfu_mlflow.tracking_store import check_store
from dfu_mlflow.types import Estimate
from dfu_mlflow.utility import utility

HEADLINES = ("fid", "fd", "kid")
BASE_STEP, SUBJECT_STEP = 0, 1
"""Steps in MLflow: as in training, 0 is the untouched base."""


@dataclass(frozen=True)
class Origin:
    """Where the subject comes from, for the links in MLflow.

    Attributes:
        source: as the user typed it.
        run_id: the training run, if there is one.
        model_id: its LoggedModel.
        version: `NAME/VERSION`.
        data_digest: of the photographs and the split it was trained on, or the start of it; None where nothing tells.
    """

    source: str
    run_id: str | None = None
    model_id: str | None = None
    version: str | None = None
    data_digest: str | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """How an evaluation ended.

    Attributes:
        run_id: its MLflow run.
        figures: the subject's, as MLflow shows them.
        sentences: what the figures say, in words.
        report: the HTML file.
    """

    run_id: str
    figures: dict[str, float]
    sentences: tuple[str, ...]
    report: Path


def run_evaluation(
    config: RunConfig,
    origin: Origin,
    open_subject: Callable[[RunConfig, Material], Subject],
    also: Callable[[Evaluation, Sighting, Sighting], None] | None = None,
) -> EvaluationResult:
    """Measure a subject as thoroughly as weights at hand allow, beside the untouched base.

    Args:
        config: photographs, base, metrics.
        origin: links for MLflow.
        open_subject: opens what is evaluated, once photographs and base are known to be good.
        also: called with the base and the subject as they were seen, to measure more inside the same MLflow run.

    Raises:
        UserError: for input that cannot be worked with.
        Interrupted: after Ctrl-C or SIGTERM.
    """
    with StopRequest() as stop:
        device = make_current(pick_device(config.device))
        source = read_source(config)
        require_memory(config, device, evaluation_memory)
        check_output_folder(config.output_dir)
        check_store()
        material = prepare(config, source)
        subject = open_subject(config, material)
        config = fitting(config, subject)
        check_subject(config, material, subject)
        observer = Observer(config, material, build_panels(config, material, thorough=True), Ranks(stop.check))
        with track(config) as tracker:
            evaluation = Evaluation(config, observer, tracker, origin)
            evaluation.describe(subject)
            base = evaluation.show(BASE_STEP, observer.base())
            seen = evaluation.show(SUBJECT_STEP, observer.subject(subject, base))
            evaluation.probe(subject, seen)
            if also is not None:
                also(evaluation, base, seen)
            return evaluation.conclude(subject, base, seen)


def fitting(config: RunConfig, subject: Subject) -> RunConfig:
    """No more pictures are compared than a folder holds, on the base's side too: distances depend on their number."""
    if subject.pictures is None or len(subject.pictures.images) >= config.evaluation.samples:
        return config
    evaluation = config.evaluation.model_copy(update={"samples": len(subject.pictures.images)})
    return config.model_copy(update={"evaluation": evaluation})


def as_drawn(config: RunConfig, subject: Subject) -> RunConfig:
    """The configuration with the sampling settings that the subject brings along: a study may have changed them."""
    if subject.sampler is None:
        return config
    brought = asdict(subject.sampler.settings) | {"batch_size": subject.sampler.batch_size}
    known = {name: brought[name] for name in type(config.sampling).model_fields if name in brought}
    return config.model_copy(update={"sampling": config.sampling.model_copy(update=known)})


class Evaluation:
    """What an evaluation writes to MLflow and into its report."""

    def __init__(self, config: RunConfig, observer: Observer, tracker: Tracker, origin: Origin) -> None:
        self.config = config
        self.observer = observer
        self.tracker = tracker
        self.origin = origin
        self.folder = config.output_dir / tracker.run_id[:8]
        self.figures: dict[str, float] = {}
        self.sections: list[Section] = []
        self.notes = dict(observer.panels.notes)
        self.said: list[str] = []

    def describe(self, subject: Subject) -> None:
        """Log what is evaluated, before anything is drawn."""
        split = self.observer.material.source.split
        identities = "; ".join(self.identities())
        settings = {"source": self.origin.source, "evaluated": subject.name, "metric_identity": identities}
        config = as_drawn(self.config, subject)
        self.tracker.params(config, settings)
        self.tracker.text("config.yaml", dump_yaml(config))
        links = {
            "evaluated.run_id": self.origin.run_id,
            "evaluated.model_id": self.origin.model_id,
            "evaluated.version": self.origin.version,
        }
        self.tracker.tags({key: value for key, value in links.items() if value} | provenance())
        counts = {label: sum(record.label == label for record in split.held_out) for label in split.classes}
        self.tracker.dataset("photographs-evaluation", dataset_digest(split), "held-out", counts, "evaluation")

    def identities(self) -> list[str]:
        """Metric identities, one a panel."""
        return [panel.reference.identity for panel in self.observer.panels.panels]

    def show(self, step: int, sighting: Sighting) -> Sighting:
        """Log one side's figures and pictures; pictures from a folder may be photographs and are logged on demand."""
        self.tracker.epoch(step, sighting.figures)
        if self.may_show(sighting):
            for label, grid in sighting.grids.items():
                self.tracker.image(f"samples/{label}", step, folded(grid))
        return sighting

    def may_show(self, sighting: Sighting) -> bool:
        """Drawn by a sampler, or asked for by name."""
        return sighting.seeded or self.config.tracking.log_real_images

    def probe(self, subject: Subject, seen: Sighting) -> None:
        """What pictures alone do not show: copies of patients' photographs, and what a classifier gains."""
        photographs, needed = len(self.observer.material.source.split.train), self.config.memorisation.neighbours
        if self.config.memorisation.enabled and photographs < needed:
            few = f"{photographs} training photographs are fewer than --memorisation.neighbours {needed}"
            self.notes["memorisation"] = few
        elif self.config.memorisation.enabled:
            self.memorisation(subject, seen)
        if self.config.utility.enabled:
            try:
                report = utility(self.config, self.observer.material, subject, self.observer.ranks.check)
                self.add(utility_section(report), "utility", report.values)
            except UserError as error:  # hours of figures are not thrown away for it
                self.notes["utility"] = masked(error)

    def memorisation(self, subject: Subject, seen: Sighting) -> None:
        """Look for copies; the closest pairs go to a folder that only the user can read."""
        config, material = self.config, self.observer.material
        extractors: dict[str, Features] = {"efficientnet_lite0": self.observer.panels.panels[0].extractor}
        known = sscd(config.metrics.sscd_weights, material.device)
        if not isinstance(known, Unavailable):
            extractors["sscd"] = known
        told = None
        if subject.sampler is not None and seen.losses is not None:
            told = membership(config, material, subject.sampler, self.observer.ranks.check)
        probe = MemorisationProbe(config, material, extractors)
        images = seen.drawn.images[seen.drawn.counted.numpy()]
        report = probe.report(images, told)
        probe.write_pairs(self.folder / "closest_pairs", report, images)
        below = sum(suspect.below for suspect in report.suspects)
        found = {True: "yes", False: "unclear" if below else "no", None: "not known"}[report.found]
        self.tracker.tags({"memorisation.found": found, "memorisation.below_threshold": below})
        self.add(memorisation_section(report, config.memorisation.pairs), "memorisation", report.values)

    def add(self, section: Section, group: str, values: Mapping[str, Estimate]) -> None:
        """Log a group of figures and keep its section for the report."""
        figures = {f"{group}/{name}": value for name, value in flatten(values).items()}
        self.tracker.epoch(SUBJECT_STEP, figures)
        self.figures |= figures
        self.sections.append(section)

    def conclude(self, subject: Subject, base: Sighting, seen: Sighting) -> EvaluationResult:
        """Compare with the base, link the figures to the model, write the report."""
        sentences = (*self.split_sentence(), *self.sentences(base, seen), *self.said)
        if self.origin.model_id is not None:
            self.tracker.link(self.origin.model_id, SUBJECT_STEP, seen.figures | self.figures)
        for report in seen.reports:
            self.notes |= report.notes
        self.tracker.tags({f"not_computed.{metric}": reason for metric, reason in self.notes.items()})
        story = EvaluationStory(
            name=self.origin.source,
            run_id=self.tracker.run_id,
            base=base.figures,
            figures=seen.figures,
            sentences=sentences,
            grids={
                label: {"base": grid, "subject": seen.grids[label]} if self.may_show(seen) else {"base": grid}
                for label, grid in base.grids.items()
            },
            seeded=seen.seeded,
            extra=self.sections,
            settings=self.settings(subject),
            identities=self.identities(),
            notes=self.notes,
        )
        html = render(evaluation_report(story))
        self.tracker.text("report.html", html)
        path = self.folder / "report.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")
        return EvaluationResult(self.tracker.run_id, seen.figures | self.figures, sentences, path)

    def split_sentence(self) -> tuple[str, ...]:
        """Said first where held-out photographs may be ones that the subject was trained on."""
        digest = dataset_digest(self.observer.material.source.split)
        known = self.origin.data_digest
        if known is None or digest.startswith(known):
            return ()
        return (
            "These are not the photographs and the split that the model was trained on: what is held out here may have "
            "been trained on, and floors, memorisation and utility then flatter it.",
        )

    def sentences(self, base: Sighting, seen: Sighting) -> tuple[str, ...]:
        """The subject against the untouched base on equal seeds, figure by figure."""
        compared = self.paired(seen, base)
        names = [name for name in HEADLINES if name in compared]
        return tuple(f"Against the untouched base, {compared[name].sentence}." for name in names)

    def paired(self, now: Sighting, before: Sighting) -> dict[str, Comparison]:
        """Two sources of pictures on equal seeds: figure -> comparison, `LABEL/figure` for each class; empty where they
        do not pair."""
        class_ids = now.drawn.class_ids[now.drawn.counted]
        found: dict[str, Comparison] = {}
        for number, panel in enumerate(self.observer.panels.panels):
            first, second = now.features[number], before.features[number]
            if now.seeded and before.seeded and len(first) == len(second) >= panel.reference.size:
                found |= panel.reference.compare(first, second, class_ids)
        return found

    def settings(self, subject: Subject) -> dict[str, str]:
        """What a person compares evaluations by."""
        shown = {"source": self.origin.source, "weights": subject.shown, "base": self.config.base_model}
        if subject.sampler is not None:
            shown |= {key: str(value) for key, value in asdict(subject.sampler.settings).items()}
            told = zip(subject.sampler.classes, subject.sampler.conditioner.prompts, strict=True)
            shown |= {f"prompt {label}": text for label, text in told}
        return shown
