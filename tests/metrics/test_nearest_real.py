"""SSIM and LPIPS to the nearest real photograph, and LPIPS within a class: by brute force, and what they reward."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from dfu_mlflow.data.phantom import render
from dfu_mlflow.metrics.extractors.pixels import pixel_values
from dfu_mlflow.metrics.lpips_distance import lpips_figures
from dfu_mlflow.metrics.matching import FeatureRows
from dfu_mlflow.metrics.pair import Pair, generated_rows
from dfu_mlflow.metrics.ssim import SSIM, ssim


def phantoms(patients: range) -> torch.Tensor:
    return torch.from_numpy(np.stack([render(p, 0, view, "IPR"[p % 3]) for p in patients for view in range(2)]))


def pixel_pair(generated: torch.Tensor) -> Pair:
    photographs = phantoms(range(6))
    real = FeatureRows(
        pixel_values()(photographs), torch.zeros(12, dtype=torch.int64), tuple(str(row // 2) for row in range(12))
    )
    return Pair(real, generated_rows(pixel_values()(generated), torch.zeros(len(generated), dtype=torch.int64)))


def test_ssim_is_scikit_images_on_the_nearest_photograph() -> None:
    real, fake = phantoms(range(6)).numpy().astype(float), phantoms(range(10, 14)).numpy().astype(float)
    nearest = [int(((real - picture) ** 2).sum((1, 2, 3)).argmin()) for picture in fake]
    expected = [
        structural_similarity(picture, real[row], data_range=255, channel_axis=2)
        for picture, row in zip(fake, nearest, strict=True)
    ]
    found = SSIM.values(pixel_pair(phantoms(range(10, 14))))
    assert found["ssim_nearest_real"] == pytest.approx(float(np.mean(expected)), rel=1e-9)


def test_ssim_of_a_picture_and_itself_is_one() -> None:
    planes = phantoms(range(1)).permute(0, 3, 1, 2).double()
    assert ssim(planes, planes).tolist() == pytest.approx([1.0, 1.0])


def test_ssim_replicates_are_the_figures_without_a_patient_or_a_picture() -> None:
    pair = pixel_pair(phantoms(range(10, 14)))
    found = SSIM.replicates(pair)
    for left_out in range(6):
        kept = torch.tensor([row for row in range(12) if row // 2 != left_out])
        expected = SSIM.values(pair.keep(kept, torch.arange(8)))["ssim_nearest_real"]
        assert float(found["ssim_nearest_real"].real[left_out]) == pytest.approx(expected, rel=1e-9)
    without_third = SSIM.values(pair.keep(torch.arange(12), torch.tensor([0, 1, 3, 4, 5, 6, 7])))
    assert float(found["ssim_nearest_real"].fake[2]) == pytest.approx(without_third["ssim_nearest_real"], rel=1e-9)


def test_blur_is_rewarded() -> None:
    """Why the figure is no measure of quality: blurred pictures of other patients come out nearer than sharp ones."""
    others = phantoms(range(10, 20))
    blurred = torch.nn.functional.avg_pool2d(others.permute(0, 3, 1, 2).float(), 9, 1, 4, count_include_pad=False)
    sharp, blur = (
        SSIM.values(pixel_pair(pictures))["ssim_nearest_real"]
        for pictures in (others, blurred.round().to(torch.uint8).permute(0, 2, 3, 1))
    )
    assert blur > sharp


def embedded(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_lpips_figures_by_brute_force() -> None:
    """On any features: LPIPS is their squared distance (parity with the package is in test_weights)."""
    real, fake = embedded(8, 0), embedded(6, 1)
    real_ids, fake_ids = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    people = ("a", "a", "b", "b", "c", "c", "d", "d")
    found = lpips_figures(Pair(FeatureRows(real, real_ids, people), generated_rows(fake, fake_ids)))

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).square().sum())

    within = [distance(fake[i], fake[j]) for i in range(6) for j in range(i) if fake_ids[i] == fake_ids[j]]
    real_pairs = [(i, j) for i in range(8) for j in range(i) if real_ids[i] == real_ids[j] and people[i] != people[j]]
    nearest = [min(distance(picture, photograph) for photograph in real) for picture in fake]
    others = [min(distance(real[i], real[j]) for j in range(8) if people[i] != people[j]) for i in range(8)]
    assert found["lpips_diversity"] == pytest.approx(np.mean(within))
    assert found["lpips_diversity_real"] == pytest.approx(np.mean([distance(real[i], real[j]) for i, j in real_pairs]))
    assert found["lpips_nearest_real"] == pytest.approx(np.mean(nearest))
    assert found["lpips_between_patients"] == pytest.approx(np.mean(others))


def test_one_patient_alone_has_no_others() -> None:
    real = FeatureRows(embedded(4, 0), torch.zeros(4, dtype=torch.int64), ("a",) * 4)
    found = lpips_figures(Pair(real, generated_rows(embedded(4, 1), torch.zeros(4, dtype=torch.int64))))
    assert not np.isfinite([found["lpips_diversity_real"], found["lpips_between_patients"]]).any()
    assert np.isfinite([found["lpips_diversity"], found["lpips_nearest_real"]]).all()
