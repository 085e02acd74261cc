"""Two checkpoints on the same seeds: the sentence, and the number of pictures that would settle it."""

import pytest
import torch

from dfu_mlflow.metrics.comparison import compare, pictures_needed
from dfu_mlflow.metrics.intervals import kernel_replicates
from dfu_mlflow.metrics.matching import FeatureRows
from dfu_mlflow.metrics.pair import Pair, generated_rows
from dfu_mlflow.types import Estimate


@pytest.mark.parametrize(
    ("value", "better", "outcome"),
    [(-0.5, "smaller", "better"), (0.5, "smaller", "worse"), (0.5, "larger", "better"), (-0.5, "larger", "worse")],
)
def test_an_interval_without_zero_decides(value: float, better: str, outcome: str) -> None:
    found = compare("kid", Estimate(value, value - 0.1, value + 0.1), better, 100)  # type: ignore[arg-type]
    assert found.outcome == outcome
    assert (
        found.sentence
        == f"kid: {outcome} (difference {value:+.4g}, 95 % interval {value - 0.1:+.4g} to {value + 0.1:+.4g})"
    )
    assert found.pictures_needed is None


def test_an_interval_with_zero_says_how_many_pictures_would_do() -> None:
    """Half width 2 at N = 100 is a standard error of 1.02: a difference of 1 needs (2.8 x 1.02)² times as many."""
    found = compare("fd", Estimate(1.0, -1.0, 3.0), "smaller", 100)
    assert found.outcome == "cannot be told apart"
    assert found.pictures_needed == pytest.approx(100 * (2.8016 * 2 / 1.95996) ** 2, rel=1e-3)
    assert "cannot be told apart at this sample size (difference +1, 95 % interval -1 to +3)" in found.sentence
    assert f"about {found.pictures_needed:,} pictures a side would show it in 80% of cases" in found.sentence
    hopeless = compare("fd", Estimate(1e-6, -1.0, 1.0), "smaller", 100)
    assert hopeless.pictures_needed is None
    assert "more than 1,000,000 pictures" in hopeless.sentence


def test_twelve_pictures_give_no_verdict() -> None:
    found = compare("kid", Estimate(-5.0, -6.0, -4.0), "smaller", 12)
    assert found.outcome == "no verdict"
    assert found.sentence == ("kid: no verdict, 12 pictures are fewer than 30 (difference -5, 95 % interval -6 to -4)")
    assert "there is no interval" in compare("kid", Estimate(-5.0), "smaller", 100).sentence
    assert compare("saturation", Estimate(0.2, 0.1, 0.3), "neither", 100).outcome == "no verdict"


def test_the_number_of_pictures_is_enough() -> None:
    """Simulated: at the number asked for, a true difference of that size is found in 65 to 95 % of repetitions."""
    start = 60
    halves, values = [], []
    for seed in range(60):
        estimate = paired_difference(seed, start)
        assert estimate.low is not None
        assert estimate.high is not None
        halves.append((estimate.high - estimate.low) / 2)
        values.append(estimate.value)
    value, half = sum(values) / len(values), sum(halves) / len(halves)
    needed = pictures_needed(Estimate(value, value - half, value + half), start)
    assert needed is not None
    assert 1.2 * start < needed < 15 * start
    found = [compare("kid", paired_difference(1000 + seed, needed), "smaller", needed).outcome for seed in range(80)]
    assert found.count("better") == 0
    assert 0.65 <= found.count("worse") / len(found) <= 0.95


def paired_difference(seed: int, pictures: int) -> Estimate:
    """The first checkpoint is a little further off; both draw from the same seeds; two photographs a patient."""
    generator = torch.Generator().manual_seed(seed)
    people, real, noise, own = (torch.randn(pictures, 12, generator=generator, dtype=torch.float64) for _ in range(4))
    real += people.repeat_interleave(2, 0)[:pictures]
    ids = torch.zeros(pictures, dtype=torch.int64)
    names = tuple(str(row // 2) for row in range(pictures))
    sides = [noise + 0.54 + 0.3 * own, noise + 0.5]
    found = [
        kernel_replicates(Pair(FeatureRows(real, ids, names), generated_rows(side, ids)).products, names)
        for side in sides
    ]
    return (found[0] - found[1]).estimate()
