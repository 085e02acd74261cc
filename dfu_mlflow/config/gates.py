"""What a challenger must show before it may become the champion: one section a clause."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dfu_mlflow.config.measures import SuccessConfig
from dfu_mlflow.config.section import NotNegative, Section


class QualityGate(Section):
    """The headline metric, paired on equal seeds; against the untouched base while there is no champion."""

    enabled: bool = True
    metric: str = "kid"
    against_champion: Literal["not_worse", "better"] = "not_worse"
    """`not_worse` refuses where the paired interval says worse; `better` wants it to say better."""
    against_base: Literal["not_worse", "better"] = "better"
    """The same for the first champion of a name."""
    margin: NotNegative | None = None
    """How much worse the far end of the interval may be, in the metric's unit; None asks for the outcome alone. With
    few pictures nothing can be told apart: a margin refuses that too."""


class ClassesGate(Section):
    """No class may regress by the same paired interval. One with too few pictures passes, all of them do not."""

    enabled: bool = True
    metric: str = "kid"


class MemorisationGate(Section):
    """Copies and membership, by the thresholds of the section `memorisation`."""

    enabled: bool = True
    required: bool = True
    """Refuse where it could not be measured."""


class FindingsGate(Section):
    """No finding of severity `blocker` in the training run's `findings.json`."""

    enabled: bool = True
    required: bool = False
    """Refuse where the run holds no findings, or only those of the cheap checks."""


class LoadsGate(Section):
    """The registered version draws one picture of each class in a process of its own."""

    enabled: bool = True
    timeout_s: Annotated[float, Field(gt=0.0, le=86_400.0)] = 600.0


class GatesConfig(Section):
    """The clauses; all of them must hold."""

    loads: LoadsGate = LoadsGate()
    quality: QualityGate = QualityGate()
    classes: ClassesGate = ClassesGate()
    memorisation: MemorisationGate = MemorisationGate()
    findings: FindingsGate = FindingsGate()
    success: SuccessConfig | None = None
    """A figure that every champion must reach, e.g. metric kid_progress, above 0.3."""
