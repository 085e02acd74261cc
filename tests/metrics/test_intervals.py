"""Jackknife: exact replicates, coverage by simulation, patients, paired differences."""

import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from dfu_mlflow.metrics.catalogue import FRECHET, KERNEL, METRICS
from dfu_mlflow.metrics.floors import floors
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
    """A 95 % interval that respects patients covers in 90 to 99 % of 200 repetitions."""
    covered = _coverage([_kernel_estimate(seed, shift) for seed in range(200)])
    assert 0.90 <= covered <= 0.99


def test_frechet_intervals_cover_the_expected_distance() -> None:
    estimates = []
    for seed in range(200):
        real, fake, patients = study(seed)
        estimates.append(frechet_replicates(real, fake, patients).estimate())
    assert 0.90 <= _coverage(estimates) <= 0.99


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


def people_rows(patients: int, seed: int) -> FeatureRows:
    """`VIEWS` photographs of each patient, away from zero as features are."""
    generator = torch.Generator().manual_seed(seed)
    people, views = (torch.randn(patients, n, WIDTH, generator=generator, dtype=torch.float64) for n in (1, VIEWS))
    features = ((people + views) * 0.5**0.5).reshape(-1, WIDTH) * torch.arange(1, WIDTH + 1) ** -0.5 + 1.0
    names = tuple(f"{seed}-{row // VIEWS}" for row in range(len(features)))
    return FeatureRows(features, torch.zeros(len(features), dtype=torch.int64), names)


@pytest.mark.slow
@pytest.mark.parametrize("training_patients", [30, 90])
def test_floor_ranges_hold_sets_of_new_patients(training_patients: int) -> None:
    """The truth of a floor: where sets of patients that nobody has seen come out, 200 repetitions.

    With 45 of 90 training photographs in a draw, draws overlap by half: without the allowance for it 78 % are held.
    """
    held: dict[str, list[bool]] = {"fd": [], "kid": []}
    for seed in range(200):
        held_out, training, new = (people_rows(n, 10_000 * k + seed) for k, n in enumerate((15, training_patients, 15)))
        found = floors([FRECHET, KERNEL], held_out, training, {0: 45}, 20, seed)
        pair = Pair(held_out, new)
        for metric in (FRECHET, KERNEL):
            for name, value in metric.values(pair).items():
                low, high = found[name].low, found[name].high
                assert low is not None
                assert high is not None
                held[name].append(low <= value <= high)
    for hits in held.values():
        assert 0.90 <= sum(hits) / len(hits) <= 0.99


def test_a_floor_from_nearly_all_training_photographs_has_no_range() -> None:
    found = floors([KERNEL], people_rows(15, 0), people_rows(16, 1), {0: 45}, 20, 0)
    assert found["kid"].low is None


@pytest.mark.parametrize("same", [True, False])
def test_paired_differences_cover_the_truth(same: bool) -> None:
    """Two checkpoints on the same seeds, 200 repetitions; equal ones are called different in at most 7 %."""
    estimates = []
    for seed in range(200):
        real, fake, patients = study(seed)
        noise = torch.randn(fake.shape, generator=torch.Generator().manual_seed(50_000 + seed), dtype=torch.float64)
        other = torch.randn(fake.shape, generator=torch.Generator().manual_seed(90_000 + seed), dtype=torch.float64)
        spread = torch.arange(1, WIDTH + 1, dtype=torch.float64) ** -0.5
        first = fake + 0.3 * noise * spread
        second = fake * (1.0 if same else 0.9) + 0.3 * other * spread
        pair = [kernel_replicates(gram(real, side), patients) for side in (first, second)]
        estimates.append((pair[0] - pair[1]).estimate())
    truth = 0.0 if same else sum(estimate.value for estimate in estimates) / len(estimates)
    ends = [(estimate.low, estimate.high) for estimate in estimates]
    covered = sum(low is not None and high is not None and low <= truth <= high for low, high in ends) / len(ends)
    assert (0.93 if same else 0.90) <= covered <= 0.99


def test_equal_distributions_are_seldom_called_different() -> None:
    """Generated rows of the photographs' own distribution: the kernel distance's interval holds zero."""
    calls = []
    for seed in range(200):
        photographs, others = people_rows(PATIENTS, seed), people_rows(GENERATED, 70_000 + seed)
        one_each = others.features[::VIEWS]
        found = kernel_replicates(gram(photographs.features, one_each), photographs.patients).estimate()
        assert found.low is not None
        assert found.high is not None
        calls.append(not found.low <= 0.0 <= found.high)
    assert sum(calls) / len(calls) <= 0.07


def test_kernel_standard_error_is_the_scatter_of_new_sets() -> None:
    """Unlike the deviation over subsets that libraries print, which is zero when a subset is the set."""
    values, errors = [], []
    for seed in range(200):
        real, fake, patients = study(seed)
        estimate = kernel_replicates(gram(real, fake), patients).estimate()
        assert estimate.low is not None
        values.append(estimate.value)
        errors.append((estimate.value - estimate.low) / 2.02)
    scatter = float(torch.tensor(values).std())
    assert sum(errors) / len(errors) == pytest.approx(scatter, rel=0.15)
    real, fake, _ = study(0)
    printed = kid_features_to_metric(real[:40], fake, kid_subsets=5, kid_subset_size=40, verbose=False)
    assert printed["kernel_inception_distance_std"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["neighbours", "vendi", "lpips"])
def test_block_intervals_cover_the_expected_figure(name: str) -> None:
    """Figures without a closed form; neighbours' are the most jagged."""
    found: dict[str, list[Estimate]] = {}
    for seed in range(100):
        real, fake, patients = study(seed)
        rows = FeatureRows(real + 1, torch.zeros(len(real), dtype=torch.int64), tuple(patients))
        pair = Pair(rows, generated_rows(fake + 1, torch.zeros(len(fake), dtype=torch.int64)))
        for figure, replicates in METRICS[name].replicates(pair).items():
            found.setdefault(figure, []).append(replicates.estimate())
    assert {figure: 0.88 <= _coverage(estimates) <= 1.0 for figure, estimates in found.items()} == dict.fromkeys(
        found, True
    )
