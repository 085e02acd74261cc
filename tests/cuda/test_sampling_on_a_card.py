"""Pictures of a card against those of a CPU: in a process, on several devices, registered, and served."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dfu_mlflow.base.load import BaseModel
from dfu_mlflow.conditioning import encode_prompts
from dfu_mlflow.config.prompts import MINIMAL
from dfu_mlflow.runtime import in_slices, release_memory, use_precision
from dfu_mlflow.sampling import Sampler, Settings
from registry.package import RegisteredSampler
from registry.sampler_pool import SamplerPool
from tests.registry.serving.conftest import running

# What libraries warn of on a card is not known yet.
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]

SETTINGS = Settings(3.0, 4, 64, (80, 96), scheduler="dpmpp_2m")
LABELS, SEEDS = ["I", "P", "R", "P"], [3, 5, 8, 13]


def open_sampler(device: torch.device, precision: str = "no") -> Sampler:
    base = BaseModel("tiny_sdxl")
    conditioner = encode_prompts(base, dict(MINIMAL), "")
    pipe = base.pipeline()
    pipe.register_modules(vae=base.vae(), unet=base.unet())
    pipe.to(device)
    use_precision(pipe.unet, device, precision)
    return Sampler(pipe, conditioner.to(device), SETTINGS, batch_size=4)


@pytest.fixture(scope="module")
def by_cpu() -> Sampler:
    return open_sampler(torch.device("cpu"))


def assert_alike(found: np.ndarray, expected: np.ndarray, share: float = 0.01) -> None:
    """At most one 8-bit step apart, on this share of the values."""
    assert found.shape == expected.shape
    apart = np.abs(found.astype(int) - expected.astype(int))
    assert apart.max() <= 1
    assert (apart > 0).mean() <= share


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("scheduler", ["base", "ddim", "euler", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_card_draws_what_a_cpu_draws(device: torch.device, by_cpu: Sampler, scheduler: str, guidance: float) -> None:
    settings = replace(SETTINGS, scheduler=scheduler, guidance_scale=guidance)
    ids = torch.tensor([0, 1, 2, 1])
    found = open_sampler(device).generate(ids, SEEDS, settings)
    assert_alike(found, by_cpu.generate(ids, SEEDS, settings))


def test_in_bf16_a_card_draws_nearly_what_a_cpu_draws_in_float32(device: torch.device, by_cpu: Sampler) -> None:
    found = open_sampler(device, "bf16").draw(LABELS, SEEDS).astype(int)
    apart = np.abs(found - by_cpu.draw(LABELS, SEEDS).astype(int))
    other = np.abs(found - found[::-1])
    assert apart.mean() < 4
    assert apart.mean() < 0.1 * other.mean()


def test_rows_that_do_not_fit_onto_the_card_are_done_in_smaller_slices(device: torch.device) -> None:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    tried: list[int] = []

    def work(part: slice) -> list[int]:
        rows = part.stop - part.start
        tried.append(rows)
        if device.type == "cuda":  # a third of what is free for each row
            torch.empty(rows * (free // 3), dtype=torch.uint8, device=device)
        elif rows > 2:
            raise torch.OutOfMemoryError
        return list(range(part.start, part.stop))

    done = in_slices(8, 8, work)
    assert [row for part in done for row in part] == list(range(8))
    assert tried[:3] == [8, 4, 2]
    assert set(tried[2:]) <= {1, 2}
    release_memory()


@pytest.mark.usefixtures("in_float32")
def test_a_sampler_goes_on_with_smaller_batches_on_a_card_that_is_too_small(
    device: torch.device, by_cpu: Sampler, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = open_sampler(device)
    labels, seeds = LABELS * 4, list(range(16))
    few = held(sampler, 2, labels, seeds)
    many = held(sampler, 16, labels, seeds)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((few + many) / 2 / total, device)
    try:
        found = sampler.draw(labels, seeds)
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert_alike(found, by_cpu.draw(labels, seeds))
    assert ("out of memory with 16 rows at once: going on with 8" in caplog.text) == (device.type == "cuda")


def held(sampler: Sampler, batch_size: int, labels: list[str], seeds: list[int]) -> int:
    """What torch takes of the card while it draws in batches of this size [bytes]; of a CPU nothing is known."""
    sampler.batch_size = batch_size
    release_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    sampler.draw(labels, seeds)
    peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    release_memory()
    return peak


def other_device() -> torch.device:
    """A second card, or the CPU beside the first."""
    return torch.device("cuda", 1) if torch.cuda.device_count() > 1 else torch.device("cpu")


@pytest.mark.usefixtures("in_float32")
def test_a_pool_draws_on_several_devices(device: torch.device, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = SamplerPool.load(bundle, (device, other_device()))
    assert [sampler.pipe.unet.device for sampler in pool.samplers] == [device, other_device()]
    used: list[int] = []
    draw = Sampler.draw

    def noted(sampler: Sampler, *arguments: Any) -> np.ndarray:
        used.append(pool.samplers.index(sampler))
        return draw(sampler, *arguments)

    monkeypatch.setattr(Sampler, "draw", noted)
    batches = [(["I", "R"], [number, number + 1]) for number in range(8)]
    found = list(pool.draw(batches, pool.first.settings))
    assert set(used) == {0, 1}
    monkeypatch.undo()
    expected = Sampler.load(bundle, "cpu")
    for images, (labels, seeds) in zip(found, batches, strict=True):
        assert_alike(images, expected.draw(labels, seeds))


def decoded(images: pd.Series) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in images])


@pytest.mark.usefixtures("in_float32")
def test_a_registered_model_draws_on_a_card(device: torch.device, registered: RegisteredSampler, bundle: Path) -> None:
    model = mlflow.pyfunc.load_model(registered.uri, model_config={"device": str(device)})
    assert model.unwrap_python_model().sampler.pipe.unet.device == device
    answer = model.predict(pd.DataFrame({"phase": ["P", "I"], "seed": [11, 12]}))
    assert_alike(decoded(answer["image"]), Sampler.load(bundle, "cpu").draw(["P", "I"], [11, 12]))


@pytest.mark.usefixtures("in_float32")
def test_the_server_draws_on_a_card(device: torch.device, registered: RegisteredSampler, bundle: Path) -> None:
    model = f"models:/{registered.name}/{registered.version}"
    with running(model, None, device=str(device)) as server:
        answer = server.post({"rows": [{"phase": "P", "seed": 11}, {"phase": "I", "seed": 12}]})
        assert server.service.versions.current.sampler.pipe.unet.device == device
    assert answer.status == 200
    assert_alike(np.stack(answer.pictures), Sampler.load(bundle, "cpu").draw(["P", "I"], [11, 12]))
