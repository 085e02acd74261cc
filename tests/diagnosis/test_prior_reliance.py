"""Prior reliance on features whose truth is known."""

from __future__ import annotations

import pytest
import torch

from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.diagnosis.prior_reliance import Drawn, _difference, _sides, reliance

WIDTH = 200


def drawn(gone: float, seed: int, classes: int = 2, apart: float = 0.0) -> Drawn:
    """24 pictures that went the share `gone` of the way to 60 photographs of 20 patients, three a patient.

    Classes differ by `apart`; the first one has most of the photographs.
    """
    source = torch.Generator().manual_seed(seed)

    def noise(count: int) -> torch.Tensor:
        return torch.randn(count, WIDTH, generator=source, dtype=torch.float64)

    way = torch.full((WIDTH,), 0.3, dtype=torch.float64)
    middles = apart * noise(classes)
    ids = torch.arange(24) % classes
    before = noise(24)
    now = before + gone * (way + middles[ids]) + 0.5 * noise(24)
    patients = torch.arange(20).repeat_interleave(3)
    real_ids = torch.where(patients < 20 - 4 * (classes - 1), 0, 1 + (patients - (20 - 4 * (classes - 1))) // 4)
    real = way + middles[real_ids] + 0.5 * noise(20)[patients] + noise(60)
    return Drawn(torch.cat([before, now], dim=1), ids, real, real_ids, patients)


def test_an_untouched_base_relies_on_its_prior_alone() -> None:
    found = reliance(drawn(0.0, 0), 0)
    assert found.value == pytest.approx(1.0, abs=0.1)
    still = drawn(0.0, 0)
    before, _ = still.pairs.chunk(2, dim=1)
    same = Drawn(torch.cat([before, before], dim=1), still.ids, still.real, still.real_ids, still.patients)
    assert (reliance(same, 0).value, reliance(same, 0).low, reliance(same, 0).high) == (1.0, 1.0, 1.0)


def test_the_planted_share_is_found_without_bias_and_inside_the_interval() -> None:
    """Without the halves the noise of the means would lengthen the way and show too large a share not gone."""
    found = [reliance(drawn(0.3, seed), seed) for seed in range(200)]
    assert abs(sum(each.value for each in found) / 200 - 0.7) < 0.02
    held = sum(each.low is not None and each.high is not None and each.low <= 0.7 <= each.high for each in found)
    assert held / 200 >= 0.9


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_classes_that_lie_apart_and_unequal_shares_do_not_count_as_reliance(classes: int) -> None:
    assert reliance(drawn(1.0, 5, classes, apart=1.0), 0).value == pytest.approx(0.0, abs=0.1)


def test_pictures_that_moved_elsewhere_still_rely_on_the_prior() -> None:
    there = drawn(0.0, 1)
    before, now = there.pairs.chunk(2, dim=1)
    aside = torch.where(torch.arange(WIDTH) % 2 == 0, 1.0, -1.0).double()
    moved = Drawn(torch.cat([before, now + aside], dim=1), there.ids, there.real, there.real_ids, there.patients)
    assert reliance(moved, 0).value > 0.8


def test_one_patient_of_a_class_is_too_few() -> None:
    few = drawn(0.5, 2)
    with pytest.raises(Lacking, match="two held-out patients"):
        reliance(Drawn(few.pairs, few.ids, few.real, few.real_ids, torch.where(few.real_ids == 1, 99, few.patients)), 0)


def test_patients_of_several_classes_are_halved_as_evenly_as_that_allows() -> None:
    """Patients 0 to 3 of one class; 0 and 2 of another as well, which halves by turns would put on one side."""
    ids = torch.tensor([0, 0, 0, 0, 1, 1])
    clusters = torch.tensor([0, 1, 2, 3, 0, 2])
    sides = _sides(ids, clusters)
    assert sides[0] != sides[2]
    assert sorted(sides.values()) == [0, 0, 1, 1]


@pytest.mark.parametrize("patients", [2, 3, 6])
def test_the_interval_over_few_patients_holds(patients: int) -> None:
    """With the normal distribution's 1.96 it would hold in 70 % of the cases for two patients."""
    draws = torch.Generator().manual_seed(0)
    found = [_difference(torch.randn(patients, generator=draws)) for _ in range(2000)]
    held = sum(each.low is not None and each.high is not None and each.low < 0 < each.high for each in found)
    assert 0.935 < held / 2000 < 0.965
