"""How much do the images come from the prompt, and how little from the data?

On held-out latents: loss of the base under the run's prompts, under the shortest way to say the same, and under none.
A caption that fits the photographs lowers the loss; one that names what the base draws by itself raises it.
Conditional pull is the size of what the caption changes, ||e(c) - e(0)|| / ||e(0)||, the vector that guidance
multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from dfu_mlflow.conditioning import Conditioner
from dfu_mlflow.config.prompts import MINIMAL
from dfu_mlflow.diagnosis.bench import Bench
from dfu_mlflow.diagnosis.prompt_linter import Lint, lint
from dfu_mlflow.objective import Objective, predict
from dfu_mlflow.types import Conditioning

NORMAL_95 = 1.96
WORDS = 12
"""Words of the longest prompt that are left out one by one, at most: the ones that pull hardest stand out among
them."""


@dataclass(frozen=True)
class Difference:
    """A paired difference of losses, relative to the loss without any prompt, with its 95 % interval over images."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PriorReliance:
    """Figures of one set of prompts.

    Attributes:
        lints: class label -> what the linter found.
        over_short: loss(prompts) - loss(shortest prompts), of the base.
        over_empty: loss(prompts) - loss(no prompt), of the base.
        pull, pull_short: conditional pull of the prompts and of the shortest ones, on the base.
        moved: how far pictures have gone from the base's at equal seeds, relative to how far the photographs are from
            the base's; None without fine-tuned weights.
        words: word -> conditional pull lost when it is left out, largest first.
    """

    lints: Mapping[str, Lint]
    over_short: Difference
    over_empty: Difference
    pull: float
    pull_short: float
    moved: float | None
    words: Mapping[str, float]


def prior_reliance(bench: Bench) -> PriorReliance:
    """Measure; raises `Lacking` without base or photographs."""
    material = bench.material
    prompts = material.source.prompts
    short = {label: MINIMAL.get(label, f"diabetic foot ulcer, {label}") for label in prompts}
    told, brief = material.conditioner, bench.with_prompts(short)
    losses = {
        name: bench.losses("base", each) for name, each in (("own", told), ("short", brief), ("empty", _empty(told)))
    }
    scale = float(losses["empty"].mean())
    return PriorReliance(
        lints={label: lint(prompt, material.pipe.tokenizer) for label, prompt in prompts.items()},
        over_short=_difference(losses["own"], losses["short"], scale),
        over_empty=_difference(losses["own"], losses["empty"], scale),
        pull=conditional_pull(bench, told),
        pull_short=conditional_pull(bench, brief),
        moved=_moved(bench) if bench.has_weights else None,
        words=word_pulls(bench, max(prompts.values(), key=len)),
    )


@torch.no_grad()
def conditional_pull(bench: Bench, told: Conditioner, images: int = 16) -> float:
    """Mean ||e(c) - e(0)|| / ||e(0)|| of the base over held-out latents at middle noise."""
    grid, pipe, device = bench.grid(), bench.material.pipe, bench.material.device
    objective = Objective(dict(pipe.scheduler.config), bench.config.loss)
    rows = torch.linspace(0, len(grid.latents) - 1, min(images, len(grid.latents))).round().long()
    column = len(grid.timesteps) // 2
    steps = grid.timesteps[column].expand(len(rows)).to(device)
    noisy = objective.scheduler.add_noise(grid.latents[rows].to(device), grid.noise(column)[rows].to(device), steps)
    with_prompt = predict(
        pipe.unet, noisy, steps, _conditioning(told, grid.class_ids[rows], grid.time_ids[rows], False)
    )
    without = predict(pipe.unet, noisy, steps, _conditioning(told, grid.class_ids[rows], grid.time_ids[rows], True))
    gap = (with_prompt - without).flatten(1).norm(dim=1) / without.flatten(1).norm(dim=1)
    return float(gap.mean())


def word_pulls(bench: Bench, prompt: str) -> dict[str, float]:
    """Per-token ablation: how much pull goes when a word is left out; words spread evenly over the prompt."""
    words = prompt.split()
    if len(words) < 2:
        return {}
    chosen = sorted({round(at * (len(words) - 1) / (WORDS - 1)) for at in range(WORDS)})
    label = bench.classes[0]
    whole = conditional_pull(bench, _one(bench, label, prompt), images=8)
    lost = {}
    for at in chosen:
        rest = " ".join(words[:at] + words[at + 1 :])
        lost[words[at].strip(",.")] = whole - conditional_pull(bench, _one(bench, label, rest), images=8)
    return dict(sorted(lost.items(), key=lambda item: -item[1]))


def _one(bench: Bench, label: str, prompt: str) -> Conditioner:
    return bench.with_prompts(dict.fromkeys(bench.classes, prompt) | {label: prompt})


def _conditioning(told: Conditioner, ids: torch.Tensor, time_ids: torch.Tensor, dropped: bool) -> Conditioning:
    return told.training(ids, torch.full((len(ids),), dropped), time_ids)


def _empty(told: Conditioner) -> Conditioner:
    """Every class told nothing."""
    count = len(told.classes)
    return replace(
        told,
        embeddings=told.empty_embeddings.expand(count, -1, -1),
        pooled=told.empty_pooled.expand(count, -1),
    )


def _difference(one: torch.Tensor, other: torch.Tensor, scale: float) -> Difference:
    """Paired by image."""
    change = (one - other).mean(dim=1) / scale
    half = NORMAL_95 * float(change.std()) / len(change) ** 0.5 if len(change) > 1 else 0.0
    mean = float(change.mean())
    return Difference(mean, mean - half, mean + half)


def _moved(bench: Bench) -> float:
    """Mean feature distance to the base's picture of the same seed, over the photographs' distance to the base's."""
    _, before = bench.draw(bench.base_sampler(), 24)
    _, now = bench.draw(bench.sampler(bench.shown), 24)
    one, other = (bench.extractor(torch.from_numpy(images)) for images in (before, now))
    real = bench.photograph_features
    return float((other - one).norm(dim=1).mean() / torch.cdist(real, one).mean())
