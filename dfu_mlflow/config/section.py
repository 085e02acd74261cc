"""What every part of the configuration is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """A part of the configuration: immutable, and unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # YAML reads the class label 0 as a number
    )

    @model_validator(mode="before")
    @classmethod
    def _lists_from_text(cls, values: Any) -> Any:
        """`a,b` for a list: what `-P data.classes=a,b` says without quoting brackets for the shell."""
        if not isinstance(values, Mapping):
            return values
        lists = {
            name
            for name, info in cls.model_fields.items()
            if any(get_origin(kind) is tuple for kind in (info.annotation, *get_args(info.annotation)))
        }
        return {
            name: [part.strip() for part in value.split(",")] if name in lists and isinstance(value, str) else value
            for name, value in values.items()
        }
