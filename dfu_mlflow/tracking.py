"""The only writer to MLflow beside `registry/`: one run, told by names that do not change.

A killed and resumed run shows one curve without gaps and without doubled points: `offer` stands before every
checkpoint, and a point that is stored already is not stored again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from dfu_mlflow import tracking_store
from dfu_mlflow.config import RunConfig, flatten
from dfu_mlflow.data.sources import CAMERA_SUFFIXES, IMAGE_SUFFIXES
from dfu_mlflow.errors import Interrupted, Pruned, UserError

BATCH_ITEMS = 100
"""MLflow takes at most 100 parameters or tags a request."""
VALUE_CHARACTERS = 6000
TAG_CHARACTERS = 8000
DIGEST_CHARACTERS = 36
BATCH_POINTS = 1000
"""And at most 1,000 metric points."""
AWAY_S = 300.0
"""Between two tries at a store that does not answer: MLflow itself tries for minutes before it gives up."""
BUFFER_S = 5.0
"""Points wait this long at most, then go in one request: on SQLite each request costs 15 ms, a point in it little.

MLflow's own asynchronous queue is not used: its `flush` blocks for up to a second, ten threads write to one SQLite
file, and a failed write shows in its log only.
"""
HEARTBEAT_S = 30.0
REASON_TAG = "exit.reason"
HEARTBEAT_TAG = "heartbeat"
NONFINITE_TAG = "metrics.nonfinite_skipped"
CHANGED_TAG = "cfg.changed_on_resume"

_SUFFIXES = "|".join(sorted((suffix[1:] for suffix in IMAGE_SUFFIXES | CAMERA_SUFFIXES), key=len, reverse=True))
IMAGE_FILE = re.compile(rf"(?:(?<=[/\\])[^/\\\n]+?|[^\s/\\,;\[\]'\"]+)\.(?:{_SUFFIXES})\b", re.IGNORECASE)
"""Names of image files; behind a path's separator everything up to the suffix, for names hold blanks and commas."""

logger = logging.getLogger(__name__)


@contextmanager
def track(config: RunConfig, resumed_run_id: str | None = None) -> Iterator[Tracker]:
    """One MLflow run around a block, ended by how the block ends.

    No exception: FINISHED. `Interrupted` or Ctrl-C: KILLED. Anything else: FAILED. The tag `exit.reason` says why,
    with names of image files masked; under `mlflow run` the status is overwritten from the exit code, the tag is not.

    Args:
        config: names the experiment and says whether system metrics are logged.
        resumed_run_id: the run to go on with; None starts one (or takes the one `mlflow run` made).

    Raises:
        UserError: the experiment is deleted.
    """
    run_id = tracking_store.open_run(config.tracking.experiment, resumed_run_id, config.tracking.system_metrics)
    status, reason = "FAILED", "crashed"
    try:
        tracker = Tracker(run_id)
        try:
            yield tracker
            status, reason = "FINISHED", "finished"
        except BaseException as error:
            status, reason = _outcome(error)
            raise
        finally:
            tracker.close(reason)
    finally:
        mlflow.end_run(status)


class Tracker:
    """Writes to one run; made by `track`.

    Attributes:
        run_id: the MLflow run.
        experiment_id: its experiment.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._client = MlflowClient()
        self.experiment_id = str(self._client.get_run(run_id).info.experiment_id)
        self._points = tracking_store.logged_points(self._client, run_id)
        self._images = tracking_store.logged_images(self._client, run_id)
        self._checkpoints = tracking_store.logged_checkpoints(self._client, run_id)
        self._buffer: list[Metric] = []
        self._datasets: dict[str, tuple[str, str]] = {}
        self._nonfinite = int(self._client.get_run(run_id).data.tags.get(NONFINITE_TAG, 0))
        self._due_s = time.monotonic() + BUFFER_S
        self._beat_s = -math.inf
        self.beat()

    def params(self, config: RunConfig, derived: Mapping[str, Any]) -> None:
        """Log the resolved configuration under `cfg/` and the derived figures at top level.

        A parameter that the run has keeps its value, for MLflow's never change: `mlflow run` logs `-P` as typed, and
        a resumed run keeps what it was started with; what the resuming configuration changes becomes a tag.
        """
        wanted = {f"cfg/{key}": _text(value) for key, value in flatten(config).items()}
        wanted |= {key: _text(value) for key, value in derived.items()}
        present = self._client.get_run(self.run_id).data.params
        changed = {
            key: value for key, value in wanted.items() if key.startswith("cfg/") and present.get(key, value) != value
        }
        if changed:
            self.tags({CHANGED_TAG: json.dumps(changed, ensure_ascii=False)})
        missing = [Param(key, value) for key, value in wanted.items() if key not in present]
        for start in range(0, len(missing), BATCH_ITEMS):
            self._client.log_batch(self.run_id, params=missing[start : start + BATCH_ITEMS])

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags, cut to MLflow's 8,000 characters; a tag that is set is overwritten."""
        tags = [RunTag(_metric_name(key), _text(value, TAG_CHARACTERS)) for key, value in values.items()]
        for start in range(0, len(tags), BATCH_ITEMS):
            self._client.log_batch(self.run_id, tags=tags[start : start + BATCH_ITEMS])

    def tag(self, name: str) -> str | None:
        """A tag's value, None where it is not set."""
        value = self._client.get_run(self.run_id).data.tags.get(name)
        return None if value is None else str(value)

    def dataset(
        self, name: str, digest: str, source: str, counts: Mapping[str, int], context: str = "training"
    ) -> None:
        """Log what was learned from, or measured against, as an input of the run: figures only, no file and no name.

        Args:
            name: what the data is called in the UI.
            digest: of the split; MLflow keeps its first 36 characters.
            source: `phantom`, or where the data lies.
            counts: images (and patients) by class.
            context: `training` or `evaluation`.
        """
        dataset = Dataset(
            name=name,
            digest=digest[:DIGEST_CHARACTERS],
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=json.dumps(dict(counts)),
        )
        tag = InputTag("mlflow.data.context", context)
        inputs = [DatasetInput(dataset, [tag])]
        try:
            self._client.log_inputs(self.run_id, inputs)
        except MlflowException:
            # Two runs that log the same new dataset at once break SQLite's unique constraint in MLflow 3.17.2; by now
            # the other one has stored it.
            self._client.log_inputs(self.run_id, inputs)
        self._datasets[context] = (dataset.name, dataset.digest)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Log figures of one optimizer step; they are stored within five seconds, or by `flush`.

        A store that does not answer does not end a training step.
        """
        self._enqueue(step, values)
        if time.monotonic() >= self._due_s:
            self.offer()

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Log and store figures of one epoch."""
        self._enqueue(epoch, values)
        self.flush()
        self.beat()

    def image(self, key: str, epoch: int, pixels: np.ndarray) -> None:
        """Log one picture of a series that the UI shows with a slider over epochs.

        Args:
            key: e.g. `samples/I`; characters that MLflow refuses become `_`, and four digits keep such names apart.
            epoch: position on the slider.
            pixels: uint8 [H, W, 3].
        """
        if pixels.dtype != np.uint8:  # MLflow would rescale floats by their own extremes
            raise ValueError(f"image {key}: pixels must be uint8, not {pixels.dtype}")
        key = _allowed(key, r"[^a-zA-Z0-9_\-./ ]")
        name = f"{key.replace('/', '~')}+step+{epoch}"
        if name not in self._images:
            self._client.log_image(self.run_id, pixels, key=key, step=epoch)
            self._images.add(name)
        self.beat()

    def text(self, path: str, text: str) -> None:
        """Log text as the artifact `path`, overwriting an older one."""
        self._client.log_text(self.run_id, text, path)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file, or a folder with all it holds, under `folder` of the run's artifacts."""
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), folder)
        else:
            self._client.log_artifact(self.run_id, str(path), folder)

    def checkpoint(self, epoch: int, weights: str, metrics: Mapping[str, float], folder: Path | None = None) -> str:
        """Log a checkpoint as a LoggedModel of the run and give back its id.

        Args:
            epoch: the epoch it was written after; the metrics' step.
            weights: `live` or `ema`.
            metrics: the epoch's figures under the run's names; linked to the evaluation dataset.
            folder: copied into the artifact store; None logs the figures alone.
        """
        name = f"epoch-{epoch:04d}-{weights}"
        if name in self._checkpoints:
            return self._checkpoints[name]
        tags = {"epoch": str(epoch), "weights": weights}
        model_id = str(
            self._client.create_logged_model(self.experiment_id, name, source_run_id=self.run_id, tags=tags).model_id
        )
        if folder is not None:
            self._client.log_model_artifacts(model_id, str(folder))
        self._link(model_id, epoch, metrics)
        self._client.finalize_logged_model(model_id, "READY")
        self._client.log_outputs(self.run_id, [LoggedModelOutput(model_id, epoch)])
        self._checkpoints[name] = model_id
        return model_id

    def link(self, model_id: str, step: int, metrics: Mapping[str, float]) -> None:
        """Show figures of this run beside a model, on the evaluation dataset; those that it shows are left out."""
        shown = self._client.get_logged_model(model_id).metrics or []
        known = {point.key for point in shown if point.step == step and point.run_id == self.run_id}
        self._link(model_id, step, {key: value for key, value in metrics.items() if _metric_name(key) not in known})

    def flush(self) -> None:
        """Block until every point is stored. Call it before a checkpoint is written: what a resumed run does not
        repeat must be in the store by then."""
        self._due_s = time.monotonic() + BUFFER_S
        while self._buffer:
            # Dropped from the buffer after the write: what a store that is away refuses is written later.
            self._client.log_batch(self.run_id, metrics=self._buffer[:BATCH_POINTS])
            del self._buffer[:BATCH_POINTS]

    def offer(self) -> None:
        """`flush`; a store that does not answer is warned of and tried again later."""
        try:
            self.flush()
            self.beat()
        except MlflowException as error:
            logger.warning("%d metric points wait for the tracking store: %s", len(self._buffer), masked(error))
            self._due_s = time.monotonic() + AWAY_S

    def beat(self) -> None:
        """Say that the run is alive (tag `heartbeat`, seconds since 1970), at most every 30 s."""
        if time.monotonic() - self._beat_s >= HEARTBEAT_S:
            self._beat_s = time.monotonic()
            self.tags({HEARTBEAT_TAG: round(time.time())})

    def close(self, reason: str) -> None:
        """Store what waits and say why the run ends; never hides the error that ends it."""
        try:
            self.flush()
            self.tags({REASON_TAG: reason, HEARTBEAT_TAG: round(time.time())})
        except Exception:
            if reason == "finished":
                raise
            logger.exception("the end of run %s could not be stored", self.run_id)

    def _enqueue(self, step: int, values: Mapping[str, float]) -> None:
        timestamp_ms = time.time_ns() // 1_000_000
        skipped = 0
        for key, value in values.items():
            key = _metric_name(key)
            known = self._points.setdefault(key, {})
            if not math.isfinite(value):
                skipped += 1
            elif step not in known:
                known[step] = (timestamp_ms, float(value))
                self._buffer.append(Metric(key, float(value), timestamp_ms, step))
        if skipped:
            self._nonfinite += skipped
            self.tags({NONFINITE_TAG: self._nonfinite})

    def _link(self, model_id: str, epoch: int, metrics: Mapping[str, float]) -> None:
        """Repeat the run's own points for a model: a point of equal time, step and value is stored once."""
        self._enqueue(epoch, metrics)
        self.flush()
        dataset = self._datasets.get("evaluation", self._datasets.get("training", (None, None)))
        points = []
        for key in map(_metric_name, metrics):
            if epoch in self._points[key]:
                timestamp_ms, value = self._points[key][epoch]
                points.append(Metric(key, value, timestamp_ms, epoch, model_id, *dataset))
        if points:
            self._client.log_batch(self.run_id, metrics=points)


def masked(text: str | BaseException) -> str:
    """One line, at most 1,000 characters, without names of patients: image files, what a `UserError` says is one."""
    line = str(text)
    for name in sorted(getattr(text, "private", ()), key=len, reverse=True):
        line = line.replace(name, "[private]")
    return IMAGE_FILE.sub("[image]", " ".join(line.split()))[:1000]


def _outcome(error: BaseException) -> tuple[str, str]:
    """Status and reason of a run that an exception ends."""
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return "FINISHED", "finished"
    message = masked(error)
    if isinstance(error, Pruned):
        return "KILLED", f"pruned: {message}"
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return "KILLED", f"interrupted: {message}".rstrip(": ")
    if isinstance(error, UserError):
        return "FAILED", f"user error: {message}"
    return "FAILED", f"{type(error).__name__}: {message}"


def _text(value: Any, limit: int = VALUE_CHARACTERS) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _metric_name(name: str) -> str:
    return _allowed(name, r"[^/\w.\- :]")


def _allowed(name: str, refused: str) -> str:
    """A name without the characters that MLflow refuses; different names stay different."""

    def allowed(part: str) -> str:
        plain = re.sub(refused, "_", part)
        return plain if plain == part else f"{plain}-{hashlib.sha256(part.encode()).hexdigest()[:4]}"

    return "/".join(map(allowed, name.split("/")))
