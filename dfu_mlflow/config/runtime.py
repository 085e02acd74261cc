"""How the processes of a run live together."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dfu_mlflow.config.section import Positive, Section


class RuntimeConfig(Section):
    """What does not touch the figures."""

    num_processes: Positive = 1
    """Filled in by the run itself from its launcher; `--launch` and `--processes` set it."""
    memory_limit_gib: Annotated[float, Field(gt=0.0)] | None = None
    """What a run may take of this machine's memory; None is all that is free. A run that would take more is refused."""
    timeout_s: Annotated[float, Field(ge=1.0)] = 600.0
    """How long a process waits for another one before the run ends and says who did not come. Above the longest work
    that the first process does alone: the metrics of an evaluation, minutes with thousands of pictures."""
