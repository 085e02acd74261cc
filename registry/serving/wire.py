"""What a request may say, and the tickets it becomes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field

from dfu_mlflow.config.serving import ServeSection
from registry.serving.batching import Ticket
from registry.serving.versions import Served

SHOWN_CHARACTERS = 60
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Wire(BaseModel):
    """JSON from outside: unknown keys and numbers without a value are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)


class Row(Wire):
    """A class, and how many pictures of it."""

    phase: str = Field(description="a class label, e.g. I, P or R")
    seed: Seed | None = Field(None, description="of the first picture; the next ones count up from it")
    count: Annotated[int, Field(ge=1)] = 1


class Params(Wire):
    """Settings of a request; what is left out is the model's own."""

    seed: Seed = Field(0, description="a row without a seed gets this plus its position")
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None


class ImageRequest(Wire):
    """What to draw."""

    rows: Annotated[list[Row], Field(min_length=1)]
    params: Params = Params()


class Invocation(BaseModel):
    """The same in the shapes that MLflow's own server takes: one of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataframe_records: list[Row] | None = None
    dataframe_split: dict[str, list[Any]] | None = Field(None, description="`columns` and `data`")
    inputs: list[Row] | None = None
    instances: list[Row] | None = None
    params: Params = Params()

    def request(self) -> ImageRequest:
        """The rows of whichever shape was used.

        Raises:
            HTTPException: 422 when none or several were, or a table is not one.
        """
        shapes = (self.dataframe_records, self.dataframe_split, self.inputs, self.instances)
        given = [shape for shape in shapes if shape is not None]
        if len(given) != 1:
            raise HTTPException(422, "give one of dataframe_records, dataframe_split, inputs and instances")
        rows: Any = given[0]
        if isinstance(rows, dict):
            try:
                rows = [dict(zip(rows["columns"], line, strict=True)) for line in rows["data"]]
            except (KeyError, TypeError, ValueError):
                raise HTTPException(422, "dataframe_split needs columns, and data with a value a column") from None
        return ImageRequest.model_validate({"rows": rows, "params": self.params})


class Picture(BaseModel):
    """One answer row."""

    image: str = Field(description="PNG, base64")
    phase: str
    seed: int
    model: str = Field(description="NAME/VERSION that drew it")


class Pictures(BaseModel):
    """An answer."""

    rows: list[Picture]


class Predictions(BaseModel):
    """An answer as MLflow's own server gives it."""

    predictions: list[Picture]


class Problem(BaseModel):
    """What is wrong with a request."""

    error: str


def tickets(request: ImageRequest, served: Served, limits: ServeSection) -> list[Ticket]:
    """One ticket a picture, in the order of the rows.

    Raises:
        HTTPException: 422 with everything that the model or the limits forbid.
    """
    _check(request, served, limits)
    params, classes = request.params, served.sampler.classes
    settings = served.sampler.settings_with(params.guidance_scale, params.num_inference_steps)
    made: list[Ticket] = []
    for row in request.rows:
        first = params.seed + len(made) if row.seed is None else row.seed
        made += [Ticket(served, classes.index(row.phase), first + position, settings) for position in range(row.count)]
    return made


def _check(request: ImageRequest, served: Served, limits: ServeSection) -> None:
    problems = []
    classes = served.sampler.classes
    unknown = sorted({row.phase[:SHOWN_CHARACTERS] for row in request.rows if row.phase not in classes})
    if unknown:
        problems.append(f"phase {', '.join(unknown)[:SHOWN_CHARACTERS]} is unknown: {', '.join(classes)} can be drawn")
    count = sum(row.count for row in request.rows)
    if count > limits.max_images:
        problems.append(f"{count} pictures: a request takes at most {limits.max_images}")
    steps, guidance_scale = request.params.num_inference_steps, request.params.guidance_scale
    if steps is not None and steps > limits.max_steps:
        problems.append(f"num_inference_steps {steps}: at most {limits.max_steps}")
    if guidance_scale is not None and guidance_scale > limits.max_guidance_scale:
        problems.append(f"guidance_scale {guidance_scale}: at most {limits.max_guidance_scale:g}")
    if problems:
        raise HTTPException(422, "; ".join(problems))
