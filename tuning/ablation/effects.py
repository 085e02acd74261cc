"""Main effects and two-factor interactions of a split-plot factorial, with intervals.

Every training run is first reduced to one number for each combination of sampled factors that is asked about: its mean,
the difference between two levels of a sampled factor, or the difference of two such differences. Those numbers are
independent between runs, so each kind is an ordinary least squares fit of its own, on the trained factors and with the
seeds as blocks (Montgomery, section 14.4: whole-plot effects are judged by whole-plot error). Intervals are Student's;
verdicts hold for the whole family of effects (Holm 1979).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import stats

from dfu_mlflow.types import Estimate
from tuning.ablation.design import Cell, Factor

Array = npt.NDArray[np.float64]
LEVEL = 0.05


@dataclass(frozen=True)
class Observation:
    """One figure of one sampling of one training run."""

    cell: Cell
    seed: int
    value: float


@dataclass(frozen=True)
class Effect:
    """What a change of level does.

    Attributes:
        factors: one name, or two for an interaction.
        estimate: high minus low; of an interaction, the first factor's effect at the second's high level minus that at
            its low one. 95 % interval of this effect alone.
        runs: training runs behind it.
        found: differs from zero when all effects of the table are judged together; None without an error estimate.
    """

    factors: tuple[str, ...]
    estimate: Estimate
    runs: int
    found: bool | None = None

    @property
    def name(self) -> str:
        return " x ".join(self.factors)


def effects(factors: Sequence[Factor], observations: Sequence[Observation]) -> tuple[Effect, ...]:
    """All main effects and two-factor interactions that the observations can tell, in the order of the factors.

    Runs with a value missing or not finite at any sampled level are left out; an effect that the remaining runs cannot
    tell from another is left out too.
    """
    trained = [factor for factor in factors if not factor.sampled]
    sampled = [factor for factor in factors if factor.sampled]
    runs = _runs(trained, sampled, observations)
    found: dict[tuple[str, ...], tuple[Effect, float]] = {}
    for order in range(3):
        for chosen in itertools.combinations(sampled, order):
            contrasts = np.array([_contrast(values, chosen) for _, _, values in runs])
            found |= _fit(trained, chosen, runs, contrasts)
    wanted: list[tuple[str, ...]] = [(factor.name,) for factor in factors]
    wanted += [(a.name, b.name) for a, b in itertools.combinations(factors, 2)]
    by_names = {frozenset(names): entry for names, entry in found.items()}
    kept = [(names, *by_names[frozenset(names)]) for names in wanted if frozenset(names) in by_names]
    return _judged([(replace(effect, factors=names), chance) for names, effect, chance in kept])


Run = tuple[Cell, int, list[tuple[Cell, float]]]


def _runs(trained: Sequence[Factor], sampled: Sequence[Factor], observations: Sequence[Observation]) -> list[Run]:
    """(trained levels, seed, samplings) of each complete run."""
    grouped: dict[tuple[tuple[str, ...], int], list[Observation]] = defaultdict(list)
    for one in observations:
        if math.isfinite(one.value):
            grouped[tuple(one.cell[factor.name] for factor in trained), one.seed].append(one)
    return [
        (found[0].cell, seed, [(one.cell, one.value) for one in found])
        for (_, seed), found in grouped.items()
        if len(found) == 2 ** len(sampled)
    ]


def _contrast(values: list[tuple[Cell, float]], chosen: Sequence[Factor]) -> float:
    """Mean, difference or difference of differences over a run's samplings."""
    signs = [math.prod(2 * factor.code(cell[factor.name]) for factor in chosen) for cell, _ in values]
    total = sum(sign * value for sign, (_, value) in zip(signs, values, strict=True))
    return float(total * 2 ** len(chosen) / len(values))


def _fit(
    trained: Sequence[Factor], chosen: Sequence[Factor], runs: Sequence[Run], contrasts: Array
) -> dict[tuple[str, ...], tuple[Effect, float]]:
    """Effects of order at most two with `chosen` in them: names -> (effect, p)."""
    names = tuple(factor.name for factor in chosen)
    terms = [c for order in range(3 - len(chosen)) for c in itertools.combinations(trained, order)]
    columns = [[math.prod((f.code(cell[f.name]) for f in term), start=1.0) for cell, _, _ in runs] for term in terms]
    blocks = _blocks([seed for _, seed, _ in runs])
    design = np.column_stack([np.array(columns).T, blocks]) if runs else np.empty((0, len(terms)))
    if not len(runs):
        return {}
    inverse = np.linalg.pinv(design)
    values, projection = inverse @ contrasts, inverse @ design
    residual = contrasts - design @ values
    free = len(runs) - int(np.linalg.matrix_rank(design))
    variance = float(residual @ residual) / free if free > 0 else 0.0
    result: dict[tuple[str, ...], tuple[Effect, float]] = {}
    for column, term in enumerate(terms):
        estimable = np.allclose(projection[column], np.eye(design.shape[1])[column], atol=1e-8)
        if not (term or chosen) or not estimable:
            continue
        order = (*(factor.name for factor in term), *names)
        error = (variance * float(inverse[column] @ inverse[column])) ** 0.5
        estimate, chance = _estimate(float(values[column]), error, free)
        result[order] = (Effect(order, estimate, len(runs)), chance)
    return result


def _estimate(value: float, error: float, free: int) -> tuple[Estimate, float]:
    """The effect with its interval, and how likely so large a one is by chance; NaN where nothing tells the error."""
    if error <= 1e-12 * max(1.0, abs(value)):
        return Estimate(value), math.nan
    half = float(stats.t.ppf(1 - LEVEL / 2, free)) * error
    return Estimate(value, value - half, value + half), float(2 * stats.t.sf(abs(value) / error, free))


def _blocks(seeds: Sequence[int]) -> Array:
    """Seeds as columns that sum to zero, so that the first column stays the mean over all of them."""
    every = sorted(set(seeds))
    signs = [[float(seed == one) - float(seed == every[-1]) for one in every[:-1]] for seed in seeds]
    return np.array(signs, np.float64).reshape(len(seeds), max(0, len(every) - 1))


def _judged(entries: Sequence[tuple[Effect, float]]) -> tuple[Effect, ...]:
    """Holm: the k-th smallest of n chances is held against LEVEL / (n - k), until the first one that fails."""
    chances = sorted(chance for _, chance in entries if math.isfinite(chance))
    failed = [k for k, chance in enumerate(chances) if chance > LEVEL / (len(chances) - k)]
    bound = chances[failed[0]] if failed else math.inf
    return tuple(
        replace(effect, found=chance < bound) if math.isfinite(chance) else effect for effect, chance in entries
    )


def verdict(effect: Effect, factors: Mapping[str, Factor], smaller_is_better: bool) -> str:
    """One sentence for a person."""
    value, low, high = effect.estimate.value, effect.estimate.low, effect.estimate.high
    first = factors[effect.factors[0]]
    change = f"{first.name}: {first.low} -> {first.high}"
    if len(effect.factors) == 2:
        second = factors[effect.factors[1]]
        change = f"{change}, at {second.name} {second.high} against {second.low}"
    if low is None or high is None:
        return f"{change} changes it by {value:+.3g}; no interval: repeat with more seeds"
    span = f"{value:+.3g} [{low:+.3g}, {high:+.3g}]"
    if not effect.found:
        return f"{change}: no effect found, {span}; more than {max(abs(low), abs(high)):.3g} either way is ruled out"
    if len(effect.factors) == 2:
        return f"{change}: the effect differs by {span}"
    return f"{change} makes it {'better' if (value < 0) == smaller_is_better else 'worse'}, {span}"
