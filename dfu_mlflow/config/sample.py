"""What the `sample` entry point takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from dfu_mlflow.config.section import Positive, Section


class CountSection(Section):
    """How many pictures, and which are dropped."""

    per_class: Positive = 8
    counts: dict[str, Annotated[int, Field(ge=0)]] | None = None
    """Class label -> how many, e.g. {I: 10, R: 3}; classes that are not named get none. None takes `per_class`."""
    max_images: Positive = 100_000
    """More are refused: a typing error fills no disk."""
    batch_size: Positive | None = None
    """Pictures drawn at a time; None takes the model's own. With 1 the files equal those that the server gives to a
    lone client byte for byte; with more, sums are rounded in another order: at most one 8-bit step on 0.1 % of the
    pixels."""
    compile: bool = False
    """`torch.compile` the UNet: minutes at the start, shorter batches; needs a C++ compiler. For thousands of pictures.
    They differ by rounding, as with another `batch_size`."""
    filter_copies: bool = True
    """Drop and draw again what is nearer to a training photograph than chance explains; needs the photographs."""
    filter_colour: bool = True
    """The same for colours outside the photographs' range, and for pictures of one colour."""
    max_draws_ratio: Annotated[float, Field(ge=1.0, le=100.0)] = 5.0
    """Pictures drawn for each one wanted, after which a class is given up as it is."""


class SampleConfig(Section):
    """What the `sample` entry point takes."""

    model: str = "models:/dfu-sampler@challenger"
    """Any registered sampler: `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
    output_dir: Path = Path("outputs/samples")
    seed: int = 0
    device: str = "auto"
    """`auto` is every GPU, else the CPU; several with commas, e.g. `cuda:0,cuda:2`. Pictures do not depend on them."""
    guidance_scale: Annotated[float, Field(ge=0.0)] | None = None
    """None takes the model's own."""
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    sample: CountSection = CountSection()
    data: dict[str, Any] = Field(default_factory=dict)
    """Where the training photographs are, if not where they were in training: the section `data` of `train`."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    memorisation: dict[str, Any] = Field(default_factory=dict)
    """When a picture counts as a copy: the sections of `train`."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        wanted = self.sample.per_class if self.sample.counts is None else sum(self.sample.counts.values())
        if wanted > self.sample.max_images:
            raise ValueError(
                f"{wanted:,} pictures are more than --sample.max_images {self.sample.max_images:,}: ask for fewer, or "
                "raise it"
            )
        return self
