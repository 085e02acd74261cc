"""Learning rate as a pure function of the optimizer step."""

from __future__ import annotations

import math
from typing import Literal


def lr_factor(
    schedule: Literal["constant", "cosine", "linear"], step: int, warmup_steps: int, total_steps: int
) -> float:
    """Share of the peak learning rate that optimizer step `step` (from 0) uses.

    Rises linearly over `warmup_steps` to 1, then stays, falls linearly or falls along half a cosine, so that the step
    after the last would use 0. Steps are optimizer updates, whatever the accumulation.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
