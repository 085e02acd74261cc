"""The embedded base: a small, real Stable Diffusion XL that reproduces phantoms and knows no phase of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import dfu_mlflow.base
from dfu_mlflow.base.pretraining.autoencoder import psnr_db, to_tensor
from dfu_mlflow.base.pretraining.grids import draw_prompt
from dfu_mlflow.config.prompts import DETAILED, MINIMAL
from dfu_mlflow.data.phantom import PHASES, render, visit_phases

FOLDER = Path(dfu_mlflow.base.__file__).parent / "weights" / "tiny_sdxl"


def draw_clinic(patients: range) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [N, 64, 64, 3] and class numbers [N], one a visit."""
    visits = [(patient, visit, phase) for patient in patients for visit, phase in enumerate(visit_phases(patient))]
    pictures = [render(patient, visit, 0, phase) for patient, visit, phase in visits]
    return np.stack(pictures), np.array([PHASES.index(phase) for _, _, phase in visits])


def thumbnails(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(len(pictures), 16, 4, 16, 4, 3).mean((2, 4)).reshape(len(pictures), -1) / 255


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionXLPipeline:
    loaded = StableDiffusionXLPipeline.from_pretrained(FOLDER, dtype=torch.float32, add_watermarker=False)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def judge() -> object:
    pictures, labels = draw_clinic(range(160))
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)).fit(thumbnails(pictures), labels)


def test_four_to_six_million_parameters_in_at_most_sixteen_megabytes(pipe: StableDiffusionXLPipeline) -> None:
    modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
    count = sum(parameter.numel() for module in modules for parameter in module.parameters())
    assert 4e6 < count < 6e6
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 16e6


def test_files_name_no_machine() -> None:
    for path in FOLDER.rglob("*.json"):
        assert not any(word in path.read_text() for word in ("_name_or_path", "/tmp", "/root", "/home")), path
    assert json.loads((FOLDER / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is True


def test_it_is_sdxl_by_its_conditioning(pipe: StableDiffusionXLPipeline) -> None:
    assert pipe.unet.config.addition_embed_type == "text_time"
    embeddings, _, pooled, _ = pipe.encode_prompt("a blue house", do_classifier_free_guidance=False)
    assert (embeddings.shape, pooled.shape) == ((1, 77, 160), (1, 96))


def test_class_prompts_fit_and_are_made_of_whole_words(pipe: StableDiffusionXLPipeline) -> None:
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        short = [len(tokenizer(prompt).input_ids) for prompt in MINIMAL.values()]
        long = [len(tokenizer(prompt).input_ids) for prompt in DETAILED.values()]
        assert max(short) <= 12
        assert all(60 <= length <= 77 for length in long)
        assert tokenizer.decode(tokenizer("Foot ulcer, é").input_ids, skip_special_tokens=True) == "foot ulcer , é"


def test_latents_are_about_standard_normal(pipe: StableDiffusionXLPipeline) -> None:
    pictures, _ = draw_clinic(range(30))
    with torch.no_grad():
        latents = pipe.vae.encode(to_tensor(pictures)).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert latents.shape[1:] == (4, 16, 16)
    assert abs(float(latents.mean())) < 0.5
    assert 0.6 < float(latents.std()) < 1.4


def test_phantoms_of_unseen_patients_survive_the_autoencoder(pipe: StableDiffusionXLPipeline, judge: object) -> None:
    pictures, labels = draw_clinic(range(160, 200))
    assert psnr_db(pipe.vae, pictures) >= 30
    with torch.no_grad():
        back = pipe.vae.decode(pipe.vae.encode(to_tensor(pictures)).latent_dist.mode()).sample.clamp(-1, 1)
    reconstructed = ((back + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert judge.score(thumbnails(reconstructed), labels) > 0.9  # type: ignore[attr-defined]


def test_it_draws_its_own_world_by_colour(pipe: StableDiffusionXLPipeline) -> None:
    red = draw_prompt(pipe, "large red house, plain white background", 6, 3.0)[:, 24:44, 24:44].mean((0, 1, 2))
    blue = draw_prompt(pipe, "large blue house, plain white background", 6, 3.0)[:, 24:44, 24:44].mean((0, 1, 2))
    assert red[0] - red[2] > blue[0] - blue[2] + 60


def test_it_knows_no_phase_of_the_clinic(pipe: StableDiffusionXLPipeline, judge: object) -> None:
    drawn = np.concatenate([draw_prompt(pipe, MINIMAL[phase], 16, 3.0) for phase in PHASES])
    labels = np.repeat(np.arange(3), 16)
    assert judge.score(thumbnails(drawn), labels) < 0.6  # type: ignore[attr-defined]
