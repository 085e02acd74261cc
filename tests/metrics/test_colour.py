"""Colour statistics of known pictures, and their distances."""

import numpy as np
import pytest
import torch
from skimage.color import rgb2hsv

from dfu_mlflow.data.phantom import render
from dfu_mlflow.metrics.colour import colour_figures
from dfu_mlflow.metrics.extractors.pixels import colour_statistics


def test_known_pictures() -> None:
    grey, red, halves = (torch.zeros(4, 4, 3, dtype=torch.uint8) for _ in range(3))
    grey += 100
    red[..., 0] = 255
    halves[:2] = 254
    halves[2:] = 1
    found = colour_statistics(4)(torch.stack([grey, red, halves]))
    assert found[0].tolist() == pytest.approx([0.0, 0.0, 0.0, 100 / 255], abs=1e-6)
    assert found[1].tolist() == pytest.approx([1.0, 1.0, 0.0, 0.299], abs=1e-6)
    assert found[2].tolist() == pytest.approx([0.0, 0.0, 253 / 255 / 2, 0.5], abs=1e-6)


def test_saturation_is_scikit_images() -> None:
    image = render(3, 0, 0, "I")
    expected = rgb2hsv(image)[..., 1].mean()
    assert float(colour_statistics(64)(torch.from_numpy(image)[None])[0, 0]) == pytest.approx(expected, rel=1e-5)


def test_distance_is_the_mean_difference_of_sorted_values() -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.rand(50, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    figures = colour_figures(real, fake * 1.5)
    for column, name in enumerate(("saturation", "clipped_share", "contrast", "brightness")):
        expected = (real[:, column].sort().values - (fake[:, column] * 1.5).sort().values).abs().mean()
        assert figures[f"{name}_w1"] == pytest.approx(float(expected))
        assert figures[name] == pytest.approx(1.5 * float(fake[:, column].mean()))
        assert figures[f"{name}_real"] == pytest.approx(float(real[:, column].mean()))


def test_too_much_guidance_shows() -> None:
    """Contrast and saturation pushed as high guidance does: all three move, and clipping appears."""
    photographs = torch.from_numpy(np.stack([render(patient, 0, 0, "IPR"[patient % 3]) for patient in range(30)]))
    mean = photographs.double().mean((1, 2, 3), keepdim=True)
    pushed = (mean + 2.5 * (photographs - mean)).clamp(0, 255).round().to(torch.uint8)
    extractor = colour_statistics(64)
    figures = colour_figures(extractor(photographs), extractor(pushed))
    assert figures["saturation"] > 1.3 * figures["saturation_real"]
    assert figures["clipped_share"] > figures["clipped_share_real"] + 0.1
    assert figures["contrast_w1"] > 0.1
