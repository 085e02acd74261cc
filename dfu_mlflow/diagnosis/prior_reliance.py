"""How much do the images come from the prompt, and how little from the data?

On held-out latents: loss of the base under the run's prompts, under the shortest way to say the same, and under none.
A caption that fits the photographs lowers the loss; one that names what the base draws by itself raises it.
Conditional pull is the size of what the caption changes, ||e(c) - e(0)|| / ||e(0)||, the vector that guidance
multiplies.

Prior reliance is the share of the way from the base's pictures to the photographs that the run's pictures have not
gone, between means of features, classes counting alike: 1 for the untouched base at equal seeds, 0 for pictures whose
mean lies where the photographs' does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from scipy import stats

from dfu_mlflow.conditioning import Conditioner
from dfu_mlflow.config.prompts import MINIMAL
from dfu_mlflow.diagnosis.bench import Bench
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.diagnosis.prompt_linter import Lint, lint
from dfu_mlflow.objective import Objective, predict
from dfu_mlflow.phases import phase
from dfu_mlflow.types import Conditioning, Estimate

RELIANCE = "prior_reliance"
"""Name of the figure in evidence and tags."""
PAIRS = 24
DRAWS = 1000
WORDS = 12
"""Words of the longest prompt that are left out one by one, at most: the ones that pull hardest stand out among
them."""


@dataclass(frozen=True)
class Difference:
    """A paired difference of losses, relative to the loss without any prompt, with its 95 % interval over patients;
    a single patient gives none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Drawn:
    """Features to compare, float64.

    Attributes:
        pairs: of the base's and the run's pictures at equal seeds, beside each other [N, 2 D].
        ids: classes of the pictures [N].
        real: of held-out photographs [M, D].
        real_ids, patients: their classes and patients [M].
    """

    pairs: torch.Tensor
    ids: torch.Tensor
    real: torch.Tensor
    real_ids: torch.Tensor
    patients: torch.Tensor


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
        reliance: prior reliance with its 95 % interval over pictures and photographs; None as `moved`, and for a class
            with a single held-out patient.
        unsaid: why there is no `reliance`, empty where there is.
        words: word -> conditional pull lost when it is left out, largest first.
    """

    lints: Mapping[str, Lint]
    over_short: Difference
    over_empty: Difference
    pull: float
    pull_short: float
    moved: float | None
    reliance: Estimate | None
    unsaid: str
    words: Mapping[str, float]


def prior_reliance(bench: Bench) -> PriorReliance:
    """Measure; raises `Lacking` without base, photographs or prompts."""
    material = bench.material
    bench.require("prompts")
    prompts = material.source.prompts
    short = {label: MINIMAL.get(label, f"diabetic foot ulcer, {label}") for label in prompts}
    told, brief = material.conditioner, bench.with_prompts(short)
    losses = {
        name: bench.losses("base", each) for name, each in (("own", told), ("short", brief), ("empty", nothing(told)))
    }
    scale = float(losses["empty"].mean())
    moved, found, unsaid = _of_pictures(bench)
    return PriorReliance(
        lints={label: lint(prompt, material.pipe.tokenizer) for label, prompt in prompts.items()},
        over_short=_difference(bench.by_patient(losses["own"] - losses["short"]) / scale),
        over_empty=_difference(bench.by_patient(losses["own"] - losses["empty"]) / scale),
        pull=conditional_pull(bench, told),
        pull_short=conditional_pull(bench, brief),
        moved=moved,
        reliance=found,
        unsaid=unsaid,
        words=word_pulls(bench, max(prompts.values(), key=len)),
    )


def _of_pictures(bench: Bench) -> tuple[float | None, Estimate | None, str]:
    """`moved`, `reliance` and `unsaid`: what needs weights or a second patient is no reason to lose the rest."""
    if isinstance(bench.files, str):
        return None, None, bench.files
    moved = None
    try:
        drawn = _drawn(bench)
        moved = moved_from_base(drawn)
        return moved, reliance(drawn, bench.config.evaluation.seed), ""
    except Lacking as reason:
        return moved, None, str(reason)


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
    with phase("leaving words out", len(chosen), "words") as progress:
        for at in chosen:
            rest = " ".join(words[:at] + words[at + 1 :])
            lost[words[at].strip(",.")] = whole - conditional_pull(bench, _one(bench, label, rest), images=8)
            progress.advance()
    return dict(sorted(lost.items(), key=lambda item: -item[1]))


def _one(bench: Bench, label: str, prompt: str) -> Conditioner:
    return bench.with_prompts(dict.fromkeys(bench.classes, prompt) | {label: prompt})


def _conditioning(told: Conditioner, ids: torch.Tensor, time_ids: torch.Tensor, dropped: bool) -> Conditioning:
    return told.training(ids, torch.full((len(ids),), dropped), time_ids)


def nothing(told: Conditioner) -> Conditioner:
    """Every class told nothing: what a dropped caption trains."""
    count = len(told.classes)
    return replace(
        told,
        embeddings=told.empty_embeddings.expand(count, -1, -1),
        pooled=told.empty_pooled.expand(count, -1),
    )


def _difference(change: torch.Tensor) -> Difference:
    """Of changes by patient [P]."""
    mean = float(change.mean())
    if len(change) < 2:
        return Difference(mean, None, None)
    half = float(stats.t.ppf(0.975, len(change) - 1) * change.std()) / len(change) ** 0.5
    return Difference(mean, mean - half, mean + half)


def _drawn(bench: Bench) -> Drawn:
    """The base's pictures, the run's at the same seeds, and held-out photographs."""
    ids, before = bench.draw(bench.base_sampler(), PAIRS)
    _, now = bench.draw(bench.sampler(bench.shown), PAIRS)
    one, other = (bench.extractor(torch.from_numpy(images)) for images in (before, now))
    records = bench.material.source.split.held_out
    patients = sorted({record.patient for record in records})
    return Drawn(
        torch.cat([one, other], dim=1),
        ids,
        bench.photograph_features,
        torch.tensor([bench.classes.index(record.label) for record in records]),
        torch.tensor([patients.index(record.patient) for record in records]),
    )


def moved_from_base(drawn: Drawn) -> float:
    """Mean distance between pairs over the mean distance of photographs to the base's pictures."""
    before, now = drawn.pairs.chunk(2, dim=1)
    return float((now - before).norm(dim=1).mean() / torch.cdist(drawn.real, before).mean())


def reliance(drawn: Drawn, seed: int) -> Estimate:
    """1 - <now - before, real - before> / |real - before|^2 of means over classes.

    The two sides of each product come from different halves of seeds and patients, or their common noise would add to
    both. The interval is the bootstrap's over seeds and patients (percentiles), a wide one.

    Raises:
        Lacking: for a class with a single held-out patient.
    """
    source = torch.Generator().manual_seed(seed)
    seeds = torch.arange(len(drawn.ids))
    pairs = _halves(drawn.pairs, drawn.ids, seeds, source)
    photographs = _halves(drawn.real, drawn.real_ids, drawn.patients, source)
    (gone, way), (other_gone, other_way) = (
        (now - before, real - before)
        for (before, now), real in zip((pair.chunk(2, dim=1) for pair in pairs), photographs, strict=True)
    )
    products = (gone * other_way).sum(dim=1) + (other_gone * way).sum(dim=1)
    values = 1 - products / (2 * (way * other_way).sum(dim=1))
    low, high = (float(values[1:].quantile(level)) for level in (0.025, 0.975))
    return Estimate(float(values[0]), low, high)


def _halves(
    rows: torch.Tensor, ids: torch.Tensor, clusters: torch.Tensor, source: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over classes [1 + DRAWS, D] of two halves of the clusters: as they are first, then of resampled ones."""
    side = _sides(ids, clusters)
    sums = [torch.zeros(1 + DRAWS, rows.shape[1], dtype=torch.float64) for _ in range(2)]
    classes = ids.unique().tolist()
    for class_id in classes:
        own = clusters[ids == class_id].unique().tolist()
        for half in range(2):
            members = torch.tensor([cluster for cluster in own if side[cluster] == half])
            if not len(members):
                raise Lacking("prior reliance takes two held-out patients of each class, one for each half")
            chosen = (ids == class_id) & torch.isin(clusters, members)
            place = torch.searchsorted(members, clusters[chosen])
            weights = _times_drawn(len(members), source)[:, place]
            sums[half] += (weights / weights.sum(dim=1, keepdim=True)) @ rows[chosen] / len(classes)
    return sums[0], sums[1]


def _sides(ids: torch.Tensor, clusters: torch.Tensor) -> dict[int, int]:
    """Cluster -> half, the same in every class it is part of; each class is halved as evenly as that allows."""
    members = [clusters[ids == class_id].unique().tolist() for class_id in ids.unique().tolist()]
    side: dict[int, int] = {}
    for own in sorted(members, key=len):  # those with the least choice first
        for cluster in own:
            if cluster not in side:
                taken = [side[other] for other in own if other in side]
                side[cluster] = int(taken.count(0) > taken.count(1))
    return side


def _times_drawn(count: int, source: torch.Generator) -> torch.Tensor:
    """How often each of `count` is drawn [1 + DRAWS, count]: once each first, then with replacement."""
    picks = torch.randint(count, (DRAWS, count), generator=source)
    drawn = torch.zeros(DRAWS, count, dtype=torch.float64).scatter_add_(1, picks, torch.ones_like(picks).double())
    return torch.cat([torch.ones(1, count, dtype=torch.float64), drawn])
