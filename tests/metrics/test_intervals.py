"""Jackknife: exact replicates, coverage by simulation, patients, paired differences."""

import pytest
import torch

from dfu_mlflow.metrics.catalogue import FRECHET
from dfu_mlflow.metrics.frechet import frechet_distance
from dfu_mlflow.metrics.gram import Gram, gram
from dfu_mlflow.metrics.intervals import Replicates, block_replicates, kernel_replicates, proportion_estimate
from dfu_mlflow.metrics.kernel import kernel_distance
from dfu_mlflow.metrics.matching import FeatureRows
from dfu_mlflow.metrics.pair import Pair, generated_rows
from dfu_mlflow.types import Estimate

PATIENTS, VIEWS, GENERATED, WIDTH = 15, 3, 40, 24


def study(seed: int, shift: float = 0.5, within: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Real rows of `PATIENTS` with `VIEWS` each, correlated `within` a patient, and independent generated rows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    people = normal(PATIENTS, 1, WIDTH) * within**0.5
    real = (people + normal(PATIENTS, VIEWS, WIDTH) * (1 - within) ** 0.5).reshape(-1, WIDTH)
    spread = torch.arange(1, WIDTH + 1, dtype=torch.float64) ** -0.5
    fake = normal(GENERATED, WIDTH) * spread
    fake[:, :4] += shift
    return real * spread, fake, [str(row // VIEWS) for row in range(PATIENTS * VIEWS)]


def frechet_replicates(real: torch.Tensor, fake: torch.Tensor, patients: list[str]) -> Replicates:
    rows = FeatureRows(real, torch.zeros(len(real), dtype=torch.int64), tuple(patients))
    pair = Pair(rows, generated_rows(fake, torch.zeros(len(fake), dtype=torch.int64)))
    return block_replicates(pair, FRECHET.values, blocks=5)["fd"]


def test_kernel_replicates_are_the_distances_without_a_patient_or_an_image() -> None:
    real, fake, patients = study(0)
    found = kernel_replicates(gram(real, fake), patients)
    names = sorted(set(patients))
    for position in (0, 3, len(names) - 1):
        kept = [row for row, name in enumerate(patients) if name != names[position]]
        assert float(found.real[position]) == pytest.approx(kernel_distance(real[kept], fake), rel=1e-9)
    without_seventh = torch.cat([fake[:6], fake[7:]])
    assert float(found.fake[6]) == pytest.approx(kernel_distance(real, without_seventh), rel=1e-9)
    assert len(found.real) == PATIENTS
    assert len(found.fake) == GENERATED


def test_frechet_replicates_keep_patients_whole_and_blocks_even() -> None:
    real, fake, patients = study(1)
    found = frechet_replicates(real, fake, patients)
    expected = {round(frechet_distance(real[rows], fake), 9) for rows in _without_every_three_patients(patients)}
    assert len(found.real) == 5
    assert len(found.fake) == 5
    assert {round(value, 9) for value in found.real.tolist()} == expected


def _without_every_three_patients(patients: list[str]) -> list[list[int]]:
    """Patients of equal size, in order of name, dealt over five blocks."""
    names = sorted(set(patients))
    return [[row for row, name in enumerate(patients) if names.index(name) % 5 != block] for block in range(5)]


@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_intervals_cover_the_expected_distance(shift: float) -> None:
    """A 95 % interval that respects patients covers in 90 to 99.5 % of 200 repetitions."""
    covered = _coverage([_kernel_estimate(seed, shift) for seed in range(160)])
    assert 0.90 <= covered <= 0.995


def test_frechet_intervals_cover_the_expected_distance() -> None:
    estimates = []
    for seed in range(120):
        real, fake, patients = study(seed)
        estimates.append(frechet_replicates(real, fake, patients).estimate())
    assert 0.90 <= _coverage(estimates) <= 0.995


def test_ignoring_patients_covers_too_rarely() -> None:
    """Five images a patient that hardly differ: taking them for independent makes the interval far too narrow."""
    ignoring, respecting = [], []
    for seed in range(160):
        generator = torch.Generator().manual_seed(seed)
        people = torch.randn(12, 1, 8, generator=generator, dtype=torch.float64)
        views = 0.2 * torch.randn(12, 5, 8, generator=generator, dtype=torch.float64)
        fake = 0.2 * torch.randn(60, 8, generator=generator, dtype=torch.float64) + 1.0
        products = gram((people + views).reshape(-1, 8), fake)
        ignoring.append(kernel_replicates(products, [str(row) for row in range(60)]).estimate())
        respecting.append(kernel_replicates(products, [str(row // 5) for row in range(60)]).estimate())
    assert _coverage(ignoring) < 0.75
    assert _coverage(respecting) >= 0.90


def _kernel_estimate(seed: int, shift: float) -> Estimate:
    real, fake, patients = study(seed, shift)
    return kernel_replicates(gram(real, fake), patients).estimate()


def _coverage(estimates: list[Estimate]) -> float:
    expected = sum(estimate.value for estimate in estimates) / len(estimates)
    ends = [(estimate.low, estimate.high) for estimate in estimates]
    return sum(low is not None and high is not None and low <= expected <= high for low, high in ends) / len(ends)


def test_paired_difference_is_narrower_than_two_intervals() -> None:
    real, fake, patients = study(2)
    first, second = (kernel_replicates(gram(real, fake * scale), patients) for scale in (1.3, 1.35))
    difference, single = (second - first).estimate(), first.estimate()
    assert difference.value == pytest.approx(second.value - first.value)
    assert difference.low is not None
    assert single.low is not None
    assert difference.low > 0
    assert difference.value - difference.low < (single.value - single.low) / 3


@pytest.mark.parametrize("patients", [["a"] * 12, ["a"] * 6 + ["b"] * 6, ["a"] * 10 + ["b", "c"]])
def test_too_few_patients_give_the_value_without_an_interval(patients: list[str]) -> None:
    real, fake, _ = study(3)
    products = gram(real[:12], fake)
    for replicates in (kernel_replicates(products, patients), frechet_replicates(real[:12], fake, patients)):
        estimate = replicates.estimate()
        assert torch.isfinite(torch.tensor(estimate.value))
        assert estimate.low is None or len(set(patients)) == 3


def test_nothing_is_random() -> None:
    real, fake, patients = study(4)
    products: Gram = gram(real, fake)
    assert kernel_replicates(products, patients).estimate() == kernel_replicates(products, patients).estimate()


def test_share_of_successes_stays_in_range() -> None:
    whole = proportion_estimate(20, 20)
    assert whole.value == 1.0
    assert whole.low == pytest.approx(20 / (20 + 1.959964**2), rel=1e-6)
    assert whole.high == pytest.approx(1.0)
