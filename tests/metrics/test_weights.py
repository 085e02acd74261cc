"""Networks with weights from outside: real classes with random weights, wrong files, caches, downloads."""

from __future__ import annotations

import hashlib
import http.server
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import lpips
import pytest
import torch
import torchvision
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from dfu_mlflow.config.measures import MetricsConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.extractors import sscd as sscd_module
from dfu_mlflow.metrics.extractors.base import NetworkExtractor, resized
from dfu_mlflow.metrics.extractors.catalogue import every_weights, fetch_weights, weights_lines
from dfu_mlflow.metrics.extractors.files import Unavailable, Weights, WeightsFile, fetch, obtain
from dfu_mlflow.metrics.extractors.lpips_embedding import lpips_embedding
from dfu_mlflow.metrics.extractors.sscd import sscd
from dfu_mlflow.metrics.extractors.vision_transformers import clip, dinov2

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def pictures(count: int, size_px: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, size_px, size_px, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights of this machine's user, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "torch/hub/checkpoints"


@pytest.fixture
def dino_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SMALL, image_size=56, patch_size=14)).save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    text = {**SMALL, "intermediate_size": 64, "vocab_size": 100, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**SMALL, "intermediate_size": 64, "image_size": 28, "patch_size": 14}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_dinov2_gives_the_class_token(dino_folder: Path) -> None:
    extractor, images = dinov2(dino_folder, "dinov2-small", False), pictures(2)
    assert isinstance(extractor, NetworkExtractor)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (resized(images, 224) / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dino_folder)(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor(images), expected.double(), atol=1e-4, rtol=1e-3)
    assert extractor.identity.startswith("dinov2@")
    assert extractor.identity.endswith("224px bicubic-antialiased")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_clip_gives_the_image_embedding(clip_folder: Path) -> None:
    extractor, images = clip(clip_folder, False), pictures(3)
    assert isinstance(extractor, NetworkExtractor)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (resized(images, 28) / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    with torch.no_grad():
        features = CLIPModel.from_pretrained(clip_folder).get_image_features(pixel_values=pixels)
    expected = getattr(features, "pooler_output", features)
    assert extractor(images).shape == (3, 24)
    torch.testing.assert_close(extractor(images), expected.double(), atol=1e-4, rtol=1e-3)


def test_both_formats_of_one_model_are_one_identity(dino_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(dino_folder, tmp_path / "pickled")
    state = Dinov2Model.from_pretrained(dino_folder).state_dict()
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save(state, tmp_path / "pickled/pytorch_model.bin")
    first, second = (dinov2(folder, "dinov2-small", False) for folder in (dino_folder, tmp_path / "pickled"))
    assert isinstance(first, NetworkExtractor)
    assert isinstance(second, NetworkExtractor)
    assert first.identity == second.identity


def test_another_model_is_an_error_and_no_stand_in(dino_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a model of kind clip\).*--metrics\.dino_weights"):
        dinov2(clip_folder, "dinov2-small", False)
    with pytest.raises(UserError, match=r"kind dinov2.*--metrics\.clip_weights"):
        clip(dino_folder, False)
    with pytest.raises(UserError, match=r"--metrics\.clip_weights"):
        clip(tmp_path / "nowhere", False)
    state = Dinov2Model.from_pretrained(dino_folder).state_dict()
    (dino_folder / "model.safetensors").unlink()
    torch.save({name: value for name, value in state.items() if "mlp" not in name}, dino_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="tensors are missing"):
        dinov2(dino_folder, "dinov2-small", False)
    (dino_folder / "pytorch_model.bin").unlink()
    (dino_folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="dinov2 weights"):
        dinov2(dino_folder, "dinov2-small", False)


def test_without_weights_there_is_a_reason(tmp_path: Path) -> None:
    missing = [
        (dinov2(None, "dinov2-small", False), "--metrics.dino_weights or --metrics.allow_download true"),
        (clip(None, False), "--metrics.clip_weights or"),
        (lpips_embedding(None, "alex", 64, False), "--metrics.lpips_weights or"),
        (sscd(None), "--metrics.sscd_weights"),
    ]
    for found, flag in missing:
        assert isinstance(found, Unavailable)
        assert flag in found.reason


class Descriptor(torch.nn.Module):
    """The outside of SSCD: any picture -> a unit vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, width))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.layers(pixels))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_sscd_is_loaded_only_from_ones_own_named_file(tmp_path: Path, empty_caches: Path) -> None:
    torch.manual_seed(0)
    network = Descriptor(512).eval()
    torch.jit.script(network).save(tmp_path / "sscd.pt")
    images = pictures(2)
    extractor = sscd(tmp_path / "sscd.pt")
    assert isinstance(extractor, NetworkExtractor)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (resized(images, 320) / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    torch.testing.assert_close(extractor(images), network(pixels).double(), atol=1e-5, rtol=1e-4)
    empty_caches.mkdir(parents=True)
    shutil.copy(tmp_path / "sscd.pt", empty_caches / sscd_module.URL.rsplit("/", 1)[-1])
    assert isinstance(sscd(None), Unavailable)
    (tmp_path / "link.pt").symlink_to(tmp_path / "sscd.pt")
    with pytest.raises(UserError, match="not a plain file of your own"):
        sscd(tmp_path / "link.pt")
    with pytest.raises(UserError, match="do not exist"):
        sscd(tmp_path / "missing.pt")
    torch.jit.script(Descriptor(128)).save(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no network")
    for name in ("other.pt", "text.pt"):
        with pytest.raises(UserError, match="does not hold sscd weights"):
            sscd(tmp_path / name)


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    state = torchvision.models.alexnet(weights=None).features.state_dict()
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save({f"features.{name}": value for name, value in state.items()}, path)
    return path


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained':UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
def test_lpips_is_the_packages(alexnet: Path) -> None:
    """The same random backbone on both sides; the heads are the package's own."""
    extractor, images = lpips_embedding(alexnet, "alex", 64, False), pictures(4, 64)
    assert isinstance(extractor, NetworkExtractor)
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = {name.removeprefix("features."): value for name, value in torch.load(alexnet, weights_only=True).items()}
    for part in (theirs.net.slice1, theirs.net.slice2, theirs.net.slice3, theirs.net.slice4, theirs.net.slice5):
        part.load_state_dict({name: value for name, value in state.items() if name in part.state_dict()})
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = theirs(pixels[:2], pixels[2:]).flatten().double()
    features = extractor(images)
    assert features.shape == (4, 31_872)
    found = (features[:2] - features[2:]).square().sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert extractor.name == "lpips_alex"


def test_lpips_refuses_another_network(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="does not hold lpips_alex weights"):
        lpips_embedding(tmp_path / "vgg.pth", "alex", 64, False)
    with pytest.raises(UserError, match=r"do not exist: mend --metrics\.lpips_weights"):
        lpips_embedding(tmp_path / "nothing.pth", "alex", 64, False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on this machine; what lies in its folder is what is published."""
    folder = tmp_path / "published"
    folder.mkdir()
    handler = partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()
        thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_file_is_fetched_once_and_checked(server: tuple[str, Path], empty_caches: Path, tmp_path: Path) -> None:
    address, published = server
    (published / "net.pth").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    weights = Weights("net", "nothing", "--metrics.net", (WeightsFile((f"{address}/net.pth",), digest[:8]),), 1)
    assert isinstance(obtain(weights, allow_download=False), Unavailable)
    assert obtain(weights, allow_download=True) == empty_caches / "net.pth"
    (published / "net.pth").unlink()
    assert obtain(weights, allow_download=True) == empty_caches / "net.pth"
    lost = fetch(weights, tmp_path / "carried")
    assert isinstance(lost, Unavailable)
    assert "404" in lost.reason
    (published / "net.pth").write_bytes(b"something else")
    wrong = fetch(weights, tmp_path / "carried")
    assert isinstance(wrong, Unavailable)
    assert "hash" in wrong.reason
    assert list((tmp_path / "carried").iterdir()) == []


def test_a_repository_is_fetched_and_found(
    server: tuple[str, Path], dino_folder: Path, empty_caches: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address, published = server
    monkeypatch.setenv("HF_ENDPOINT", address)
    shutil.copytree(dino_folder, published / "facebook/dinov2-small/resolve/main")
    config = MetricsConfig()
    found = fetch_weights(config, ["dinov2"])["dinov2"]
    assert found == empty_caches / "facebook--dinov2-small"
    assert isinstance(dinov2(None, "dinov2-small", False), NetworkExtractor)
    carried = fetch_weights(config, ["dinov2"], tmp_path / "carried")["dinov2"]
    assert isinstance(carried, Path)
    extractor = dinov2(carried, "dinov2-small", False)
    assert isinstance(extractor, NetworkExtractor)
    with pytest.raises(UserError, match="weights dino: the metrics can use"):
        fetch_weights(config, ["dino"])


def test_the_hubs_other_format_is_taken_where_the_first_is_not_published(
    server: tuple[str, Path], clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, published = server
    monkeypatch.setenv("HF_ENDPOINT", address)
    folder = published / "openai/clip-vit-large-patch14-336/resolve/main"
    folder.mkdir(parents=True)
    shutil.copy(clip_folder / "config.json", folder)
    torch.save(CLIPModel.from_pretrained(clip_folder).state_dict(), folder / "pytorch_model.bin")
    extractor = clip(None, allow_download=True)
    assert isinstance(extractor, NetworkExtractor)
    tower = CLIPVisionModelWithProjection.from_pretrained(clip_folder, projection_dim=24)
    assert extractor.dimension == tower.config.projection_dim


def test_everything_is_listed(alexnet: Path, tmp_path: Path) -> None:
    config = MetricsConfig(lpips_weights=alexnet, sscd_weights=tmp_path / "lost.pt")
    every = every_weights(config)
    lines = weights_lines(every)
    assert [weights.name for weights in every] == ["dinov2", "inception", "sscd", "lpips_alex", "clip"]
    assert (
        "inception (for fid; about 91 MB; sha256 6726825d…; --metrics.inception_weights): missing, from h" in lines[1]
    )
    assert f"configured, but not there: {tmp_path / 'lost.pt'}" in lines[2]
    assert f"configured: {alexnet}" in lines[3]
    assert "no hash published" in lines[4]


def test_no_network_is_said_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port where nobody listens stands for a closed network."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = fetch_weights(MetricsConfig(), ["dinov2", "clip"])
    for name, result in found.items():
        assert isinstance(result, Unavailable)
        assert f"{name} weights could not be downloaded" in result.reason
        assert "refused" in result.reason
