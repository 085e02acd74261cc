"""How much do the images come from the prompt, and how little from the data?

On held-out latents: loss of the base under the run's prompts, under the shortest way to say the same, and under none.
A caption that fits the photographs lowers the loss; one that names what the base draws by itself raises it.
Conditional pull is the size of what the caption changes, ||e(c) - e(0)|| / ||e(0)||, the vector that guidance
multiplies.

Prior reliance is the share of the way from the base's pictures to the photographs that the run's pictures have not
gone, between means of features: 1 for the untouched base at equal seeds, 0 for pictures whose mean lies where the
photographs' does.
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
from dfu_mlflow.types import Conditioning, Estimate

NORMAL_95 = 1.96
RELIANCE = "prior_reliance"
"""Name of the figure in evidence and tags."""
PAIRS = 24
DRAWS = 1000
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
        moved: how far pictures have gone from the base's at equal seeds, in any direction, relative to how far the
            photographs are from the base's; None without fine-tuned weights.
        reliance: prior reliance with its 95 % interval over pictures and photographs; None as `moved`.
        words: word -> conditional pull lost when it is left out, largest first.
    """

    lints: Mapping[str, Lint]
    over_short: Difference
    over_empty: Difference
    pull: float
    pull_short: float
    moved: float | None
    reliance: Estimate | None
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
    drawn = _drawn(bench) if bench.has_weights else None
    return PriorReliance(
        lints={label: lint(prompt, material.pipe.tokenizer) for label, prompt in prompts.items()},
        over_short=_difference(losses["own"], losses["short"], scale),
        over_empty=_difference(losses["own"], losses["empty"], scale),
        pull=conditional_pull(bench, told),
        pull_short=conditional_pull(bench, brief),
        moved=None if drawn is None else moved_from_base(*drawn),
        reliance=None if drawn is None else reliance(*drawn, bench.config.evaluation.seed),
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


def _drawn(bench: Bench) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of the base's pictures, of the run's at the same seeds, and of held-out photographs."""
    _, before = bench.draw(bench.base_sampler(), PAIRS)
    _, now = bench.draw(bench.sampler(bench.shown), PAIRS)
    one, other = (bench.extractor(torch.from_numpy(images)) for images in (before, now))
    return one, other, bench.photograph_features


def moved_from_base(before: torch.Tensor, now: torch.Tensor, real: torch.Tensor) -> float:
    """Mean distance of pairs [N, D], [N, D] over the mean distance of photographs [M, D] to the base's pictures."""
    return float((now - before).norm(dim=1).mean() / torch.cdist(real, before).mean())


def reliance(before: torch.Tensor, now: torch.Tensor, real: torch.Tensor, seed: int) -> Estimate:
    """1 - <now - before, real - before> / |real - before|^2 of means, from features [N, D], [N, D] (pairs), [M, D].

    The two sides of each product come from different halves of the rows, or their common noise would add to both. The
    interval is the bootstrap's (percentiles), a wide one: it held the truth in 199 of 200 simulations.
    """
    source = torch.Generator().manual_seed(seed)
    sides = []
    for half in (0, 1):
        pairs, photographs = _shares(len(before[half::2]), source), _shares(len(real[half::2]), source)
        start = pairs @ before[half::2]
        sides.append((pairs @ now[half::2] - start, photographs @ real[half::2] - start))
    (gone, way), (other_gone, other_way) = sides
    products = (gone * other_way).sum(dim=1) + (other_gone * way).sum(dim=1)
    values = 1 - products / (2 * (way * other_way).sum(dim=1))
    low, high = (float(values[1:].quantile(level)) for level in (0.025, 0.975))
    return Estimate(float(values[0]), low, high)


def _shares(count: int, source: torch.Generator) -> torch.Tensor:
    """Weights of rows [1 + DRAWS, count]: all alike first, then as often as each was drawn."""
    picks = torch.randint(count, (DRAWS, count), generator=source)
    drawn = torch.zeros(DRAWS, count, dtype=torch.float64).scatter_add_(1, picks, torch.ones_like(picks).double())
    return torch.cat([torch.ones(1, count, dtype=torch.float64), drawn]) / count
