"""What the terminal shows while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from dfu_mlflow.config.schema import RunConfig
from dfu_mlflow.preparation import Source


class Console:
    """A bar over all steps with loss, images/s and time left; a line for each evaluation.

    Args:
        epochs: to train.
        steps_per_epoch: optimizer steps.
    """

    def __init__(self, epochs: int, steps_per_epoch: int) -> None:
        self.epochs = epochs
        self.bar: Any = tqdm(total=epochs * steps_per_epoch, unit="step", dynamic_ncols=True, mininterval=1.0)

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
        if step > self.bar.n:
            self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(
            f"loss {figures['step/loss']:.3f}, {figures['step/images_per_s']:.0f} images/s", refresh=False
        )

    def evaluating(self, epoch: int) -> None:
        """An evaluation begins."""
        self.bar.set_description("evaluating" if epoch else "evaluating the untouched base")
        self.bar.refresh()

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
        self.bar.set_description(f"epoch {min(epoch + 1, self.epochs)}/{self.epochs}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.write(text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()
