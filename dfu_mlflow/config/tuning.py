"""The section of the `tune` entry point: what is searched, how, and where the study is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dfu_mlflow.config.section import Positive, Section

Choice = bool | int | float | str | None

FIXED = (
    "output_dir",
    "resume",
    "device",
    "seed",
    "train.mixed_precision",
    "data.root",
    "data.manifest",
    "data.bounding_boxes",
    "data.group_by",
    "data.classes",
    "data.resolution_px",
    "data.box_margin_min",
    "data.box_margin_max",
    "data.validation_fraction",
    "data.min_side_px",
    "data.max_bad_fraction",
    "data.cache_dir",
    "sampling.batch_size",
)
FIXED_SECTIONS = (
    "data.phantom.",
    "tune.",
    "tracking.",
    "registry.",
    "gates.",
    "evaluation.",
    "metrics.",
    "memorisation.",
    "utility.",
)
"""What must be the same in every trial and every run of a study, so that figures can be compared."""


def is_fixed(name: str) -> bool:
    """Must a setting be the same throughout a study?"""
    return name in FIXED or name.startswith(FIXED_SECTIONS)


class SearchRange(Section):
    """One setting's values: `low` to `high`, or `choices`.

    A setting that is an integer in the configuration is searched in integers.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Choice, ...] | None = None
    when: dict[str, Choice] | None = None
    """Settings of the same space that must have these values; else the configuration's own value stays."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ranged = self.low is not None and self.high is not None
        if ranged == (self.choices is not None) or (self.choices is not None and self.log):
            raise ValueError("tune space: each setting needs either low and high (and perhaps log), or choices")
        if self.low is not None and self.high is not None:
            if self.low > self.high:
                raise ValueError(f"tune space: low {self.low:g} is above high {self.high:g}")
            if self.log and self.low <= 0:
                raise ValueError(f"tune space: low {self.low:g} cannot be searched on a log scale: give one above 0")
        if self.choices is not None and len(set(self.choices)) < 2:
            raise ValueError("tune space: choices needs at least two different values")
        return self


RANGE_KEYS = frozenset(SearchRange.model_fields)

TRAINING_SPACE: Mapping[str, Mapping[str, Any]] = {
    "prompts.style": {"choices": ["minimal", "detailed"]},
    "prompts.dropout": {"low": 0.0, "high": 0.3},
    "loss.perceptual_loss.enabled": {"choices": [False, True]},
    "loss.perceptual_loss.weight": {
        "low": 1e-3,
        "high": 0.3,
        "log": True,
        "when": {"loss.perceptual_loss.enabled": True},
    },
    "loss.min_snr_gamma": {"choices": [None, 1.0, 5.0, 20.0]},
    "train.learning_rate": {"low": 2e-4, "high": 4e-3, "log": True},
    "adapter.method": {"choices": ["full", "lora"]},
    "adapter.rank": {"choices": [4, 16, 64], "when": {"adapter.method": "lora"}},
    "ema.decay": {"choices": [0.9, 0.99, 0.999]},
}
"""For the embedded base. `loss.perceptual_loss.network` belongs here where VGG16's weights are at hand."""

SAMPLING_SPACE: Mapping[str, Mapping[str, Any]] = {
    "sampling.guidance_scale": {"low": 1.0, "high": 8.0},
    "sampling.num_inference_steps": {"low": 4, "high": 16},
    "sampling.scheduler": {"choices": ["ddim", "euler", "dpmpp_2m", "unipc"]},
    "sampling.guidance_rescale": {"low": 0.0, "high": 0.7},
}


class TuneConfig(Section):
    """A study: settings are tried one after another, each a trial."""

    kind: Literal["training", "sampling"] = "training"
    """`training` trains for each trial; `sampling` draws from one frozen checkpoint (`source`)."""
    trials: Positive = 8
    """Settings tried by all processes of the study together; a dead worker's trial that is retried counts once."""
    study: str | None = None
    """Processes that name the same study share it, and the same command goes on with it; None is `dfu-KIND`."""
    storage: str = "sqlite:///optuna.db"
    """Any database that SQLAlchemy opens; several machines want PostgreSQL: `postgresql://USER@HOST/NAME`, with the
    password in the environment's PGPASSWORD."""
    space: dict[str, SearchRange] | None = None
    """Setting -> its values: `{train.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}, adapter.rank: [4, 16]}`.
    None is the one at the top of this file."""
    sampling_space: dict[str, SearchRange] | None = None
    """The same of a sampling study."""
    source: str = "models:/dfu-sampler@challenger"
    """Of a sampling study: whatever `evaluate` opens and that draws."""
    objectives: tuple[str, ...] | None = None
    """Figures to improve. A training study has one, `evaluation.best_metric`; a sampling study takes several."""
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    startup_trials: Positive = 4
    """Trials drawn at random before the sampler has something to learn from."""
    population: Annotated[int, Field(ge=2)] = 20
    """Of nsga2."""
    seed: int = 0
    pruner: Literal["hyperband", "asha", "none"] = "hyperband"
    """Ends trainings early whose figure after an epoch is behind others'."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """Of the pruners: one trial in so many goes on from rung to rung."""
    epochs: Positive | None = 3
    """Of each training; None is train.epochs."""
    steps_per_epoch: Positive | None = 40
    """Of each training; None is train.steps_per_epoch."""
    samples: Positive | None = 60
    """Pictures that a training trial is judged by; None is evaluation.samples."""
    samples_per_setting: Positive = 36
    """Pictures that a sampling setting is judged by."""
    guidance: tuple[Annotated[float, Field(ge=0.0)], ...] = (1.5, 3.0, 5.0)
    """Guidance scales that each finished training is judged at; its best is what counts."""
    heartbeat_s: Positive = 60
    """A running trial is given up by the others after three of these without a sign of life."""
    max_retries: Annotated[int, Field(ge=0)] = 2
    """How often a dead worker's trial is tried again."""
    max_failures: Positive = 3
    """Trials in a row without a figure after which this process stops."""

    @field_validator("space", "sampling_space", mode="before")
    @classmethod
    def _by_dotted_name(cls, value: Any) -> Any:
        """`{train: {learning_rate: [..]}}`, as flags arrive, and `train.learning_rate: [..]` are the same."""
        return dict(_settings(value)) if isinstance(value, Mapping) else value

    def effective_space(self) -> dict[str, SearchRange]:
        """What a study of this kind searches."""
        stated, own = (self.space, TRAINING_SPACE) if self.kind == "training" else (self.sampling_space, SAMPLING_SPACE)
        return stated or {name: SearchRange.model_validate(values) for name, values in own.items()}


def _settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, list | tuple):
            yield name, {"choices": value}
        elif isinstance(value, Mapping) and value and not (set(value) & RANGE_KEYS):
            yield from _settings(value, f"{name}.")
        else:
            yield name, value
