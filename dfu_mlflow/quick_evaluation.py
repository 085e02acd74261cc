"""The small evaluation of epochs that the budget has no full one for, and of all others, so that its curve is one.

Its figures depend on fewer pictures, so they have names, floors and a base of their own: `eval_quick/...`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dfu_mlflow.evaluation_budget import Quick
from dfu_mlflow.evaluator import Drawn, Evaluator, Observation, Panel, extract

SAME = 0.98
"""Share of the live weights' way from which their average draws the same pictures."""


def quick_evaluator(full: Evaluator, quick: Quick) -> Evaluator:
    """Measures on fewer pictures, against the same photographs' features."""
    panels: list[Panel] = []
    for panel in full.panels:
        samples = panels[0].reference.size if panels else quick.pictures
        panels.append(Panel(panel.extractor, panel.reference.resized(samples, f"{quick.steps} solver steps")))
    return Evaluator(
        full.material,
        full.objective,
        replace(full.settings, num_inference_steps=quick.steps),
        tuple(panels),
        full.config.model_copy(update={"samples": quick.pictures}),
        full.ranks,
    )


def quick_part(quick: Evaluator, full: Evaluator, seen: Observation, batch_size: int) -> Observation:
    """What the quick evaluation sees of weights that were just seen in full: the first pictures of each class.

    Where the solver steps differ, the weights in the UNet draw them.
    """
    part = _first(quick, seen.drawn) if quick.settings == full.settings else None
    if part is None:
        drawn = quick.draw(batch_size)
        return Observation(seen.losses, drawn, extract(quick.panels, drawn, quick.ranks))
    drawn, rows = part
    return Observation(seen.losses, drawn, tuple(features[rows] for features in seen.features))


def _first(quick: Evaluator, drawn: Drawn) -> tuple[Drawn, torch.Tensor] | None:
    """The quick evaluation's pictures among others of the same seeds, and which rows of their features they are.

    None where they are not all among them.
    """
    wanted = quick.numbers()
    rows, counted = [], []
    for class_id, count in enumerate(wanted):
        known = (drawn.class_ids == class_id).nonzero().flatten()
        needed = max(count, quick.config.grid_per_class)
        if len(known) < needed or not bool(drawn.counted[known[:count]].all()):
            return None
        rows.append(known[:needed])
        counted.append(torch.arange(needed) < count)
    chosen, compared = torch.cat(rows), torch.cat(counted)
    features = drawn.counted.cumsum(0)[chosen[compared]] - 1
    return Drawn(drawn.images[chosen.numpy()], drawn.class_ids[chosen], compared), features
