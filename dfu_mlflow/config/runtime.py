"""How the processes of a run live together."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dfu_mlflow.config.section import Section


class RuntimeConfig(Section):
    """What does not touch the figures."""

    timeout_s: Annotated[float, Field(ge=1.0)] = 600.0
    """How long a process waits for another one before the run ends and says who did not come. Above the longest work
    that the first process does alone: the metrics of an evaluation, minutes with thousands of pictures."""
