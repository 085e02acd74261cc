"""The section and the plans of the `study` entry point: which factors, at which levels, repeated how often."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dfu_mlflow.config.load import Tree, merge, read_tree, validate
from dfu_mlflow.config.section import Section
from dfu_mlflow.errors import UserError

PLANS = Path(__file__).parent / "plans"
WEIGHTS = "weights"
"""The one setting of a level that is none of the configuration: `live` or `ema`, which weights are sampled."""

Level = dict[str, Any]


class Plan(Section):
    """A factorial of two-level factors.

    A level is a mapping from settings by dotted name to their values; the second level's effect is what is reported. A
    factor whose levels hold `sampling.*` or `weights` alone costs no training.
    """

    description: str = ""
    factors: Annotated[dict[str, dict[str, Level]], Field(min_length=1)]
    common: Level = Field(default_factory=dict)
    """What holds in every run."""
    fraction: Literal["full", "half"] = "full"
    """`half` trains half of the combinations; from five trained factors on no main effect or interaction is lost."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    """Every combination is trained once for each; intervals need two or more."""
    headlines: Annotated[tuple[str, ...], Field(min_length=1)] = ("kid", "fd", "saturation", "class_accuracy")
    """Figures that effects are told of, as under `eval/`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, levels in self.factors.items():
            if len(levels) != 2:
                raise ValueError(
                    f"factor {name} has {len(levels)} levels: a factorial takes two; a curve is what `tune` is for"
                )
            if any(level.get(WEIGHTS, "live") not in ("live", "ema") for level in levels.values()):
                raise ValueError(f"factor {name}: weights are live or ema")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: each is named once")
        return self


def read_plan(name: str, change: Tree) -> Plan:
    """A built-in plan by name, or one from a YAML file, with `change` over it.

    Raises:
        UserError: for a plan that is not there or does not fit.
    """
    known = {path.stem: path for path in sorted(PLANS.glob("*.yaml"))}
    path = known.get(name, Path(name))
    if not path.is_file():
        raise UserError(f"--plan {name} is neither a file nor one of {', '.join(known)}")
    return validate(Plan, merge(read_tree(str(path.resolve())), change))
