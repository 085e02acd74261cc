"""A registered model -> a folder of synthetic pictures with a manifest: seeded, filtered, and resumable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException

from dfu_mlflow.bundle_format import Settings
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import merge, validate
from dfu_mlflow.config.sample import CountSection, SampleConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.interrupt import StopRequest
from dfu_mlflow.phases import Progress, phase
from dfu_mlflow.runtime import derive_seed, pick_devices, require_compiler
from dfu_mlflow.sampling import Sampler
from registry.memory import require_room
from registry.picture import picture_facts, png
from registry.picture_checks import COLOUR, COPY, Photographs, PictureChecks, Verdict
from registry.sample_folder import MANIFEST, SampleFolder, check_folder
from registry.sampler_pool import Batch, SamplerPool
from registry.source import Located, locate, resolve_version


@dataclass(frozen=True)
class Sampled:
    """How it ended.

    Attributes:
        manifest: path, class, seed, settings, model and similarity of each picture.
        sentences: how many were drawn, kept and dropped.
        complete: whether every class has as many pictures as were asked for.
    """

    manifest: Path
    sentences: tuple[str, ...]
    complete: bool


def sample(config: SampleConfig) -> Sampled:
    """Draw pictures into OUTPUT_DIR/CLASS/NUMBER.png; a folder that the same command left unfinished is gone on with.

    Raises:
        UserError: for a model that is not registered, classes it does not know, photographs that are not at hand while
            copies are to be filtered, or a folder that holds other pictures.
        Interrupted: after Ctrl-C or SIGTERM; what is drawn stays.
    """
    if config.sample.compile:
        require_compiler("sample.compile")
    located = _locate(config.model)
    devices = pick_devices(config.device)
    require_room(located.folder, devices[0])
    pool = SamplerPool.load(located.folder, devices)
    counts = _counts(config.sample, pool.first.classes)
    photographs, notes = _photographs(config, located, str(devices[0]))
    settings = _settings(config, pool.first, str(located.version), counts)
    settings["photographs"] = None if photographs is None else photographs.digest
    check_folder(config.output_dir, settings)
    pool.set_batch_size(int(settings["batch_size"]))
    if config.sample.compile:
        pool.compile()
    filters = [name for name, on in ((COPY, config.sample.filter_copies), (COLOUR, config.sample.filter_colour)) if on]
    with StopRequest() as stop, SampleFolder(config.output_dir, settings) as folder:
        filling = Filling(pool, PictureChecks(photographs, filters), folder, settings)
        with phase("sampling", sum(counts.values()), "pictures", keep=True) as progress:
            for label, count in counts.items():
                progress.detail(label)
                filling.fill(label, count, stop, progress)
    return Sampled(config.output_dir / MANIFEST, (*notes, *filling.sentences(counts)), filling.complete(counts))


class Filling:
    """Fills a folder class by class, batch by batch.

    Candidates of a class are numbered; the first `count` are drawn, then as many as were dropped, and so on. Batches
    are cut from these rounds alike every time, so a folder that was gone on with, or drawn on several devices, equals
    one drawn in one go.
    """

    def __init__(
        self, pool: SamplerPool, checks: PictureChecks, folder: SampleFolder, settings: Mapping[str, Any]
    ) -> None:
        self.pool, self.checks, self.folder, self.settings = pool, checks, folder, settings
        self.known = folder.decided()
        self.decided: dict[tuple[str, int], bool] = {}
        self.reused = 0

    def fill(self, label: str, count: int, stop: StopRequest, progress: Progress) -> None:
        """Draw until `count` pictures of a class are kept, or too many were drawn for it."""
        for batches in self._rounds(label, count):
            there = list(takewhile(lambda numbers: self._is_known(label, numbers), batches))
            for numbers in there:
                self._decide(label, {number: self.known[label, number] for number in numbers}, progress)
                self.reused += len(numbers)
            missing = batches[len(there) :]
            if missing and self.known:  # the first batch that is not whole ends what can be used of an earlier attempt
                self.folder.forget(self.decided)
                self.known = {}
            for numbers, images in zip(missing, self._draw(label, missing, stop), strict=True):
                self._decide(label, self._keep(label, numbers, images), progress)

    def kept(self, label: str) -> int:
        """Pictures of a class so far."""
        return sum(keep for (own, _), keep in self.decided.items() if own == label)

    def complete(self, counts: Mapping[str, int]) -> bool:
        """Whether nothing is missing."""
        return all(self.kept(label) == count for label, count in counts.items())

    def sentences(self, counts: Mapping[str, int]) -> tuple[str, ...]:
        """How many were drawn, kept and dropped, and what is missing."""
        kept = sum(self.decided.values())
        said = [f"{len(self.decided)} drawn, {kept} kept, {len(self.decided) - kept} dropped (see rejected.csv)"]
        if self.reused:
            said.append(f"{self.reused} of them were there from an earlier attempt")
        short = [
            f"{label} {self.kept(label)} of {count}" for label, count in counts.items() if self.kept(label) < count
        ]
        if short:
            limit = f"{self.settings['max_draws_ratio']:g}"
            said.append(f"too many were dropped ({', '.join(short)}) within --sample.max_draws_ratio {limit}")
        return tuple(said)

    def _rounds(self, label: str, count: int) -> Iterator[list[range]]:
        start, most = 0, int(count * float(self.settings["max_draws_ratio"]))
        size = int(self.settings["batch_size"])
        while (missing := count - self.kept(label)) > 0 and start < most:
            end = min(start + missing, most)
            yield [range(first, min(first + size, end)) for first in range(start, end, size)]
            start = end

    def _is_known(self, label: str, numbers: range) -> bool:
        return all((label, number) in self.known for number in numbers)

    def _decide(self, label: str, kept: Mapping[int, bool], progress: Progress) -> None:
        self.decided |= {(label, number): keep for number, keep in kept.items()}
        progress.advance(sum(kept.values()))

    def _draw(self, label: str, batches: Sequence[range], stop: StopRequest) -> Iterator[np.ndarray]:
        def asked() -> Iterator[Batch]:
            for numbers in batches:
                stop.check()
                yield [label] * len(numbers), self._seeds(label, numbers)

        return self.pool.draw(asked(), self._drawn_with())

    def _seeds(self, label: str, numbers: range) -> list[int]:
        class_id = self.pool.first.classes.index(label)
        return [picture_seed(int(self.settings["seed"]), class_id, number) for number in numbers]

    def _drawn_with(self) -> Settings:
        own = self.settings
        return self.pool.first.settings_with(float(own["guidance_scale"]), int(own["num_inference_steps"]))

    def _keep(self, label: str, numbers: range, images: np.ndarray) -> dict[int, bool]:
        """Check and write a batch; number -> whether it is kept."""
        settings, seeds = self._drawn_with(), self._seeds(label, numbers)
        pictures: dict[str, bytes] = {}
        kept: list[dict[str, object]] = []
        rejected: list[dict[str, object]] = []
        for number, seed, image, verdict in zip(numbers, seeds, images, self.checks(images), strict=True):
            if verdict.rejected:
                which = {"class": label, "seed": seed, "number": number}
                rejected.append({**which, "reason": verdict.rejected, "explanation": verdict.reason})
                continue
            facts = picture_facts(label, seed, settings, str(self.settings["model"]))
            row = _row(number, facts, verdict)
            pictures[str(row["path"])] = png(image, facts)
            kept.append(row)
        self.folder.write(pictures, kept, rejected)
        dropped = {row["number"] for row in rejected}
        return {number: number not in dropped for number in numbers}


def picture_seed(seed: int, class_id: int, number: int) -> int:
    """Seed of the candidate `number` of a class: they count up, so no two of a class are alike.

    Below 2^53 while numbers are below 2^52: JSON readers and tables that keep numbers as float64 keep it whole.
    """
    return derive_seed(seed, "sample", class_id) % 2**52 + number


def _row(number: int, facts: Mapping[str, object], verdict: Verdict) -> dict[str, object]:
    """A line of the manifest. Files are named by number: seeds of two folders may meet, numbers of a class never."""
    return {
        "path": f"{facts['class']}/{number:06d}.png",
        "number": number,
        **facts,
        "nearest_similarity": "" if verdict.similarity is None else f"{verdict.similarity:.4f}",
        "nearest_features": verdict.features,
    }


def _locate(model: str) -> Located:
    if not model.startswith("models:/") or model.startswith("models:/m-"):
        raise UserError(f"--model {model}: give models:/NAME@ALIAS or models:/NAME/VERSION")
    try:
        return locate(f"models:/{resolve_version(model)}")
    except (MlflowException, OSError) as error:
        raise UserError(f"--model {model} cannot be loaded: {str(error).splitlines()[0]}") from None


def _counts(section: CountSection, classes: tuple[str, ...]) -> dict[str, int]:
    counts = section.counts or dict.fromkeys(classes, section.per_class)
    unknown = sorted(set(counts) - set(classes))
    if unknown:
        raise UserError(f"--sample.counts: unknown class {', '.join(unknown)}: this model draws {', '.join(classes)}")
    if sum(counts.values()) > section.max_images:
        total = f"{sum(counts.values()):,}"
        raise UserError(
            f"{total} pictures are more than --sample.max_images {section.max_images:,}: ask for fewer, or raise it"
        )
    return {label: counts[label] for label in classes if counts.get(label)}


def _settings(config: SampleConfig, sampler: Sampler, model: str, counts: Mapping[str, int]) -> dict[str, Any]:
    """Everything that decides which pictures lie in the folder."""
    own = sampler.settings
    guidance, steps = config.guidance_scale, config.num_inference_steps
    return {
        "model": model,
        "seed": config.seed,
        "counts": dict(counts),
        "guidance_scale": own.guidance_scale if guidance is None else guidance,
        "num_inference_steps": own.num_inference_steps if steps is None else steps,
        "scheduler": own.scheduler,
        "batch_size": config.sample.batch_size or sampler.batch_size,
        "compile": config.sample.compile,
        "filter_copies": config.sample.filter_copies,
        "filter_colour": config.sample.filter_colour,
        "max_draws_ratio": config.sample.max_draws_ratio,
        "memorisation": config.memorisation,
    }


def _photographs(config: SampleConfig, located: Located, device: str) -> tuple[Photographs | None, tuple[str, ...]]:
    """The version's training photographs; where they are not at hand, None and a sentence, if copies may pass."""
    stated = {"data": config.data, "metrics": config.metrics, "memorisation": config.memorisation}
    try:
        if located.configuration is None and not config.data:
            raise UserError("the version does not tell which photographs it was trained on")
        own = merge(located.configuration or {}, {"device": device, "resume": "none"})
        return Photographs(validate(RunConfig, merge(own, stated)), located.data_digest), ()
    except UserError as error:
        if config.sample.filter_copies:
            raise UserError(
                f"copies of training photographs cannot be told without them ({error}): say where they are with "
                "--data.root, or --sample.filter_copies false to let copies pass"
            ) from None
        return None, (f"similarity to training photographs was not measured, copies may be among these: {error}",)
