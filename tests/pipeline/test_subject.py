"""Whatever is evaluated is opened as what it is, and draws what it drew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from dfu_mlflow.base.shared_unet import SharedUNet
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import merge, validate
from dfu_mlflow.config.schema import DataConfig
from dfu_mlflow.data import evaluation_pixels
from dfu_mlflow.errors import UserError
from dfu_mlflow.participant import TrainingResult
from dfu_mlflow.pipeline import run_training
from dfu_mlflow.preparation import Material, prepare, read_source
from dfu_mlflow.sampling import Sampler
from dfu_mlflow.subject import Subject, Weights, local_configuration, open_subject, read_pictures, with_settings
from dfu_mlflow.types import Record
from tests.stores import new_store


@pytest.fixture(scope="module")
def trained(
    small_config_at: Callable[[Path], RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, TrainingResult]:
    """A LoRA run of a few steps, large enough in its rate that its weights show."""
    folder = tmp_path_factory.mktemp("trained")
    change = {"adapter": {"method": "lora"}, "train": {"learning_rate": 3e-2, "warmup_steps": 0}}
    config = validate(RunConfig, merge(small_config_at(folder).model_dump(mode="json"), change))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # artifacts go below the working directory
        mlflow.set_tracking_uri(new_store(folder))
        result = run_training(config)
        mlflow.set_tracking_uri(None)
    return config, result


@pytest.fixture(scope="module")
def material(trained: tuple[RunConfig, TrainingResult]) -> Material:
    return prepare(trained[0], read_source(trained[0]))


def pictures_of(subject: Subject) -> np.ndarray:
    assert subject.sampler is not None
    return subject.sampler.draw(["I", "R"], [1, 2])


def test_checkpoint_run_and_bundle_draw_the_same(trained: tuple[RunConfig, TrainingResult], material: Material) -> None:
    config, result = trained
    assert result.bundle is not None
    expected = Sampler.load(result.bundle).draw(["I", "R"], [1, 2])
    run = open_subject(result.folder, config, material)
    assert run.shown == result.shown
    assert np.array_equal(pictures_of(run), expected)
    assert np.array_equal(pictures_of(open_subject(result.bundle, config, material)), expected)


def test_a_bundle_draws_in_the_precision_that_it_was_evaluated_in(
    small_config_at: Callable[[Path], RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = {
        "adapter": {"method": "lora", "frozen_dtype": "bfloat16"},
        "train": {"learning_rate": 3e-2, "warmup_steps": 0, "mixed_precision": "bf16", "epochs": 1},
    }
    config = validate(RunConfig, merge(small_config_at(tmp_path).model_dump(mode="json"), change))
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(new_store(tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one precision a process
    try:
        result = run_training(config)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        mlflow.set_tracking_uri(None)
    assert result.bundle is not None
    drawn = Sampler.load(result.bundle).draw(["I", "R"], [1, 2])
    material = prepare(config, read_source(config))
    run = open_subject(result.folder, config, material)
    assert np.array_equal(drawn, pictures_of(run))
    float32 = replace(material, shared_unet=SharedUNet(material.device, "no"))
    assert not np.array_equal(drawn, pictures_of(open_subject(result.folder, config, float32)))


def test_weights_are_those_asked_for(trained: tuple[RunConfig, TrainingResult], material: Material) -> None:
    config, result = trained
    checkpoint = result.folder / "checkpoints" / "step-00000006"
    choices: tuple[Weights, ...] = ("live", "ema")
    live, ema = (open_subject(checkpoint, config, material, weights) for weights in choices)
    base = open_subject(Path(config.base_model), config, material)
    assert (live.shown, ema.shown, base.shown) == ("live", "ema", "pipeline")
    drawn = [pictures_of(subject) for subject in (live, ema, base)]
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_a_run_and_its_checkpoints_know_their_configuration(
    trained: tuple[RunConfig, TrainingResult], tmp_path: Path
) -> None:
    config, result = trained
    for folder in (result.folder, result.folder / "checkpoints" / "step-00000006"):
        assert validate(RunConfig, local_configuration(folder) or {}) == config
    assert local_configuration(tmp_path) is None


def test_settings_that_the_user_typed_replace_the_samplers(
    trained: tuple[RunConfig, TrainingResult], material: Material
) -> None:
    subject = open_subject(trained[1].folder, trained[0], material)
    changed = with_settings(subject, {"guidance_scale": 7.0, "batch_size": 3}).sampler
    assert changed is not None
    assert subject.sampler is not None
    assert changed.settings.guidance_scale == 7.0
    assert changed.batch_size == 3
    assert changed.settings.num_inference_steps == subject.sampler.settings.num_inference_steps


def write(path: Path, size: tuple[int, int] = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 30)).save(path)


def test_pictures_come_with_their_classes(tmp_path: Path) -> None:
    for name in ("I/a.png", "I/deeper/b.jpg", "P/c.png"):
        write(tmp_path / name)
    (tmp_path / "I" / "manifest.csv").write_text("no picture")
    found = read_pictures(tmp_path, ["I", "P"], DataConfig())
    assert found.images.shape == (3, 64, 64, 3)
    assert torch.equal(found.class_ids, torch.tensor([0, 0, 1]))
    assert found.names == ("I/a.png", "I/deeper/b.jpg", "P/c.png")


def test_pictures_of_another_size_are_seen_as_the_photographs_are(tmp_path: Path) -> None:
    """Square from the middle, reduced by the same filter: a copy stays one."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 150, 3), dtype=np.uint8)
    (tmp_path / "I" / ".hidden").mkdir(parents=True)
    for name in ("I/a.png", "I/.b.png", "I/.hidden/c.png"):
        Image.fromarray(noise).save(tmp_path / name)
    record = Record(tmp_path / "I" / "a.png", "I", "a", "0", (150, 96))
    found = read_pictures(tmp_path, ["I"], DataConfig())
    assert found.names == ("I/a.png",)
    assert np.array_equal(found.images, evaluation_pixels([record], DataConfig()).numpy())


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"I/a.png": (64, 64)}, "no sub-folder for class P"),
        ({"I/a.png": (64, 64), "P/a.txt": None}, "P holds no pictures"),
        ({"I/a.png": (64, 64), "P/a.png": (32, 48)}, "2 sizes (1 of 64x64, 1 of 32x48)"),
        ({"I/a.png": (64, 64), "P/a.png": None}, "a.png cannot be decoded"),
        ({"I/a.png": (80, 48), "P/a.png": (80, 48)}, "of 80x48, smaller than --data.resolution_px 64"),
    ],
)
def test_pictures_that_cannot_be_measured_are_named(
    tmp_path: Path, files: dict[str, tuple[int, int] | None], said: str
) -> None:
    for name, size in files.items():
        if size is None:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        else:
            write(tmp_path / name, size)
    with pytest.raises(UserError) as error:
        read_pictures(tmp_path, ["I", "P"], DataConfig())
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["missing", "0" * 32])
def test_what_is_no_folder_is_named(
    trained: tuple[RunConfig, TrainingResult], material: Material, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UserError, match="is no folder: give a checkpoint"):
        open_subject(tmp_path / name, trained[0], material)


def test_weights_of_another_model_are_refused(trained: tuple[RunConfig, TrainingResult], material: Material) -> None:
    other = validate(RunConfig, merge(trained[0].model_dump(mode="json"), {"adapter": {"method": "full"}}))
    with pytest.raises(UserError, match="does not hold this model's weights"):
        open_subject(trained[1].folder, other, material)
