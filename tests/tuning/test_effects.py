"""Effects of split-plot factorials: planted ones come back, intervals cover them, nothing is found in noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest

from dfu_mlflow.errors import UserError
from tuning.ablation.design import Factor, cells
from tuning.ablation.effects import Effect, Observation, effects, verdict

TRAINED = (Factor("prompts", "minimal", "detailed"), Factor("method", "lora", "full"))
SAMPLED = (Factor("guidance", "3", "12", sampled=True), Factor("weights", "live", "ema", sampled=True))
FACTORS = (*TRAINED, *SAMPLED)
PLANTED = {
    ("prompts",): 0.5,
    ("method",): -1.0,
    ("guidance",): 2.0,
    ("weights",): 0.0,
    ("prompts", "method"): 0.7,
    ("prompts", "guidance"): -0.4,
    ("guidance", "weights"): 0.3,
}


def draw(
    seeds: int, run_noise: float, noise: float, generator: np.random.Generator, planted: Mapping[tuple[str, ...], float]
) -> list[Observation]:
    """Training runs with an error of their own, sampled at every combination of the sampled factors."""
    codes = {factor.name: factor for factor in FACTORS}
    found = []
    for seed, run in itertools.product(range(seeds), cells(TRAINED)):
        shared = 10 + 0.3 * seed + run_noise * generator.standard_normal()
        for sampling in cells(SAMPLED):
            cell = run | sampling
            value = shared + noise * generator.standard_normal()
            for names, size in planted.items():
                value += size * math.prod(codes[name].code(cell[name]) for name in names)
            found.append(Observation(cell, seed, value))
    return found


def by_name(found: tuple[Effect, ...]) -> dict[tuple[str, ...], Effect]:
    return {effect.factors: effect for effect in found}


def test_planted_effects_come_back_exactly_without_noise() -> None:
    found = by_name(effects(FACTORS, draw(2, 0.0, 0.0, np.random.default_rng(0), PLANTED)))
    assert len(found) == 4 + 6
    for names, effect in found.items():
        assert effect.estimate.value == pytest.approx(PLANTED.get(names, 0.0), abs=1e-9)


def test_effects_are_differences_of_means() -> None:
    observations = draw(3, 0.5, 0.2, np.random.default_rng(1), PLANTED)
    found = by_name(effects(FACTORS, observations))
    for factor in FACTORS:
        sides = [
            np.mean([one.value for one in observations if one.cell[factor.name] == level])
            for level in (factor.low, factor.high)
        ]
        assert found[(factor.name,)].estimate.value == pytest.approx(sides[1] - sides[0])


def test_intervals_cover_and_runs_not_samplings_are_counted() -> None:
    """95 % intervals in 200 studies; a run's own error, shared by its samplings, must not be averaged away."""
    covered = {("prompts",): 0, ("guidance",): 0, ("prompts", "guidance"): 0, ("guidance", "weights"): 0}
    generator = np.random.default_rng(2)
    for _ in range(200):
        found = by_name(effects(FACTORS, draw(3, 0.5, 0.1, generator, PLANTED)))
        for names in covered:
            estimate = found[names].estimate
            assert estimate.low is not None
            assert estimate.high is not None
            covered[names] += estimate.low <= PLANTED[names] <= estimate.high
    assert all(0.90 <= count / 200 <= 0.99 for count in covered.values()), covered


def test_noise_alone_seldom_yields_a_finding() -> None:
    generator = np.random.default_rng(3)
    studies = [effects(FACTORS, draw(3, 0.5, 0.1, generator, {})) for _ in range(200)]
    assert sum(any(effect.found for effect in study) for study in studies) / 200 <= 0.08


def test_a_harmful_factor_is_found_beside_an_inert_one() -> None:
    found = by_name(effects(FACTORS, draw(3, 0.3, 0.1, np.random.default_rng(4), {("guidance",): 1.0})))
    codes = {factor.name: factor for factor in FACTORS}
    assert found[("guidance",)].found
    assert "3 -> 12 makes it worse" in verdict(found[("guidance",)], codes, smaller_is_better=True)
    assert not found[("weights",)].found
    assert "no effect found" in verdict(found[("weights",)], codes, smaller_is_better=True)


def test_incomplete_runs_are_left_out() -> None:
    observations = draw(3, 0.3, 0.1, np.random.default_rng(5), PLANTED)
    broken = [Observation(observations[0].cell, observations[0].seed, math.nan), *observations[1:]]
    assert {effect.runs for effect in effects(FACTORS, broken)} == {11}


def test_one_seed_gives_values_without_verdicts() -> None:
    found = by_name(effects(FACTORS, draw(1, 0.3, 0.1, np.random.default_rng(6), PLANTED)))
    assert found[("prompts",)].found is None
    assert found[("prompts",)].estimate.low is None


def test_confounded_effects_are_left_out() -> None:
    observations = draw(3, 0.1, 0.1, np.random.default_rng(7), PLANTED)
    together = [one for one in observations if (one.cell["prompts"] == "minimal") == (one.cell["method"] == "lora")]
    found = by_name(effects(FACTORS, together))
    assert not {("prompts",), ("method",)} & set(found)
    assert ("guidance",) in found


def test_a_half_fraction_keeps_main_effects_and_interactions_apart() -> None:
    factors = [Factor(name, "no", "yes") for name in "abcde"]
    chosen = cells(factors, "half")
    assert len(chosen) == 16
    design = np.array([[factor.code(cell[factor.name]) for factor in factors] for cell in chosen])
    pairs = np.stack([design[:, i] * design[:, j] for i, j in itertools.combinations(range(5), 2)], 1)
    every = np.hstack([np.ones((16, 1)), design, pairs])
    assert np.linalg.matrix_rank(every) == 16
    with pytest.raises(UserError, match="half fraction of 4"):
        cells(factors[:4], "half")
