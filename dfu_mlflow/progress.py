"""What the terminal shows while a run goes on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.phases import Progress, phase, say
from dfu_mlflow.preparation import Source

PACE_STEPS = 20
"""Latest steps that the time left is told from."""


class Console:
    """A bar over all steps with loss, images/s and time left; a line for each evaluation.

    Args:
        epochs: to train.
        steps_per_epoch: optimizer steps.
        every_epochs: of which one is evaluated; the last always is.
    """

    def __init__(self, epochs: int, steps_per_epoch: int, every_epochs: int = 1) -> None:
        self.epochs, self.steps_per_epoch, self.every_epochs = epochs, steps_per_epoch, every_epochs
        self._held = ExitStack()
        self._progress: Progress | None = None
        self._paces_s: deque[float] = deque(maxlen=PACE_STEPS)
        self._stepped_s: float | None = None
        self._evaluation_s = 0.0

    def opening(self, config: RunConfig, source: Source, derived: Mapping[str, Any], run_id: str) -> None:
        """What is trained on what."""
        split = source.split
        for label, prompt in source.prompts.items():
            train = [record for record in split.train if record.label == label]
            held = [record for record in split.held_out if record.label == label]
            patients = [len({record.patient for record in records}) for records in (train, held)]
            shown = prompt if len(prompt) <= 60 else prompt[:57] + "..."
            self.say(
                f"class {label}: {len(train)} images of {patients[0]} patients to train, {len(held)} of {patients[1]} "
                f"held out; prompt {shown!r}"
            )
        if (noticed := source.audit.in_short()) is not None:
            self.say(noticed)
        self.say(
            f"{derived['method']} fine-tuning of {config.base_model}: {100 * derived['trainable_fraction']:.1f} % of "
            f"the UNet learns; MLflow run {run_id}"
        )

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Move the bar."""
        now_s = time.monotonic()
        if self._stepped_s is not None:
            self._paces_s.append(now_s - self._stepped_s)
        self._stepped_s = now_s
        progress = self._bar(step - 1)
        progress.reach(max(step, progress.done))
        epoch = min((step - 1) // self.steps_per_epoch + 1, self.epochs)
        progress.detail(
            f"epoch {epoch}/{self.epochs}, loss {figures['step/loss']:.3f}, {figures['step/images_per_s']:.0f} images/s"
        )
        if self._paces_s:
            progress.expect(self._left_s(step))

    @contextmanager
    def evaluating(self, epoch: int) -> Iterator[None]:
        """An evaluation goes on."""
        self._bar(epoch * self.steps_per_epoch)
        began_s = time.monotonic()
        with phase(f"evaluating epoch {epoch}" if epoch else "evaluating the untouched base"):
            yield
        self._evaluation_s = time.monotonic() - began_s
        self._stepped_s = None

    def epoch(self, epoch: int, figures: Mapping[str, float]) -> None:
        """One line of the epoch's headlines."""
        parts = [f"epoch {epoch}/{self.epochs}"]
        if "train/loss" in figures:
            parts.append(f"train loss {figures['train/loss']:.3f}")
        parts.append(f"validation loss {figures['val/loss']:.3f}")
        full = any(name.startswith("eval/") for name in figures)
        for weights in ("", "_ema"):
            for metric in ("fid", "fd", "kid"):
                name = f"eval{'' if full else '_quick'}{weights}/{metric}"
                if name in figures:
                    told = ", ".join([*([] if full else ["quick"]), *(["EMA"] if weights else [])])
                    text = f"{metric}{told and f' ({told})'} {figures[name]:.4g}"
                    progress = figures.get(f"{name}_progress")
                    parts.append(
                        text if progress is None or epoch == 0 else f"{text} ({100 * progress:.0f} % of the way)"
                    )
        self.say("  ".join(parts))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        say(text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._held.close()
        self._progress = None

    def _bar(self, step: int) -> Progress:
        """The bar, begun at the first step or evaluation of this process: a resumed run does not begin at 0."""
        if self._progress is None:
            total = self.epochs * self.steps_per_epoch
            self._progress = self._held.enter_context(phase("training", total, "steps", keep=True))
            self._progress.begin_at(step)
        return self._progress

    def _left_s(self, step: int) -> float:
        """Steps and evaluations to come, at the pace of the latest."""
        epochs = range((step - 1) // self.steps_per_epoch + 1, self.epochs + 1)
        coming = [epoch for epoch in epochs if epoch % self.every_epochs == 0 or epoch == self.epochs]
        return (self.epochs * self.steps_per_epoch - step) * median(self._paces_s) + len(coming) * self._evaluation_s
