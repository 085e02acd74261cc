"""What `benchmarks.cuda` measures, in this order, and the configuration of each case."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dfu_mlflow.config import RunConfig, load

BASE = "base"
PICTURE_STEPS = 30
"""Solver steps of a picture, as the presets of Stable Diffusion XL have it."""


@dataclass(frozen=True)
class Case:
    """One child process.

    Attributes:
        name: as `--cases` has it; `@low` and `@high` stand for the two sizes.
        kind: `base`, `training`, `sampling`, `chain` or `optimizers`.
        preset: of the configuration.
        high: the larger of the two sizes.
        changes: settings that differ from the preset's, as flags.
        starts: about how many times a plain case's start-up it takes before it has figures.
    """

    name: str
    kind: str
    preset: str
    high: bool = False
    changes: tuple[str, ...] = ()
    starts: float = 1.0


CASES = (
    Case("lora_12gb@low", "training", "sdxl_lora_12gb"),
    Case("chain", "chain", "sdxl_lora_12gb", starts=3.0),
    Case("lora_12gb@high", "training", "sdxl_lora_12gb", high=True),
    Case("full_24gb@high", "training", "sdxl_full_24gb", high=True),
    Case("sample@high", "sampling", "sdxl_full", high=True),
    Case("full_24gb@low", "training", "sdxl_full_24gb"),
    Case("sample@low", "sampling", "sdxl_full"),
    Case("lora@high", "training", "sdxl_lora", high=True),
    Case("lora@low", "training", "sdxl_lora"),
    Case("optimizers", "optimizers", "sdxl_lora", starts=0.5),
    Case("lora_8bit@low", "training", "sdxl_lora", changes=("--train.optimizer", "adamw_8bit")),
    Case("compile@low", "training", "sdxl_lora", changes=("--train.compile", "true"), starts=4.0),
    Case("full@high", "training", "sdxl_full", high=True),
)
"""What tells most stands first: a run is cut off when its time is up."""


@dataclass(frozen=True)
class Request:
    """What a child process is told.

    Attributes:
        case: name of the case, or `base`.
        folder: of everything that is written: `base`, `cache`, `runs`, and the tracking store.
        device: as `--device` has it.
        px: edge of the pictures.
        seconds: of steady work that is measured.
        small: the small architecture.
    """

    case: str
    folder: str
    device: str
    px: int
    seconds: float
    small: bool

    @property
    def base(self) -> Path:
        """Folder of the random base."""
        return Path(self.folder) / "base"

    def tree(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def find(name: str) -> Case:
    """The case of this name."""
    return next(case for case in CASES if case.name == name)


def case_config(request: Request) -> RunConfig:
    """The preset of a case on the random base and a few phantom pictures; the chain's is a run of three steps."""
    case = find(request.case)
    folder = Path(request.folder)
    flags: dict[str, object] = {
        "base_model": request.base,
        "device": request.device,
        "output_dir": folder / "runs" / case.name,
        "data.root": "phantom",
        "data.phantom.patients": 12,
        "data.cache_dir": folder / "cache",
        "data.resolution_px": request.px,
        "data.views_per_image": 1,
        "data.min_side_px": 32,
        "sampling.num_inference_steps": 2 if request.small else PICTURE_STEPS,
        "train.epochs": 1,
        "train.steps_per_epoch": 10_000,
    }
    if case.kind == "chain":
        flags |= {
            "train.steps_per_epoch": 3,
            "sampling.num_inference_steps": 4,
            "evaluation.samples": 12,
            "evaluation.grid_per_class": 2,
            "evaluation.validation_images": 6,
            "evaluation.validation_timesteps": 4,
            "tracking.experiment": "benchmarks.cuda",
        }
    if request.small:
        flags |= {"adapter.rank": 4, "train.batch_size": 1, "train.gradient_accumulation_steps": 1}
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return load(RunConfig, case.preset, [*given, *case.changes])
