"""Requests and answers of the registered model, over a sampler whose pictures can be predicted."""

from __future__ import annotations

import base64
import io
import threading
import time

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from dfu_mlflow.bundle_format import Settings
from dfu_mlflow.errors import UserError
from registry.sampler import SamplerModel

CLASSES = ("I", "P", "R")
DEFAULTS = {"seed": 0, "guidance_scale": 3.0, "num_inference_steps": 15}


class ColourSampler:
    """Draws (class, seed, steps) as a colour, and notices a second request that comes in between."""

    classes = CLASSES

    def __init__(self) -> None:
        self.busy = False

    def settings_with(self, guidance_scale: float | None, num_inference_steps: int | None) -> Settings:
        return Settings(guidance_scale or 3.0, num_inference_steps or 15, 4, (4, 4))

    def draw(
        self, labels: list[str], seeds: list[int], guidance_scale: float | None, num_inference_steps: int | None
    ) -> np.ndarray:
        if self.busy:
            raise RuntimeError("two requests at once")
        self.busy = True
        time.sleep(0.01)
        if guidance_scale == 13.0:
            raise UserError("guidance 13 brings bad luck")
        colours = [(CLASSES.index(label), seed, num_inference_steps) for label, seed in zip(labels, seeds, strict=True)]
        images = np.zeros((len(labels), 5, 4, 3), np.uint8)
        images[:] = np.array(colours, np.uint8)[:, None, None, :]
        self.busy = False
        return images


@pytest.fixture
def model() -> SamplerModel:
    made = SamplerModel()
    made.configure(ColourSampler(), {"model": "dfu-sampler/3", "max_rows": 8})
    return made


def ask(model: SamplerModel, rows: dict[str, list[object]], **params: float) -> pd.DataFrame:
    return model.predict(None, pd.DataFrame(rows), DEFAULTS | params)


def colour(image: str) -> tuple[int, ...]:
    with Image.open(io.BytesIO(base64.b64decode(image, validate=True))) as picture:
        assert picture.format == "PNG"
        assert picture.size == (4, 5)
        return tuple(int(value) for value in np.asarray(picture)[0, 0])


def test_a_row_is_answered_with_a_row(model: SamplerModel) -> None:
    answer = ask(model, {"phase": ["R", "I"], "seed": [7, 9]}, num_inference_steps=20)
    assert list(answer.columns) == ["image", "phase", "seed", "model"]
    assert [colour(image) for image in answer["image"]] == [(2, 7, 20), (0, 9, 20)]
    assert answer["phase"].tolist() == ["R", "I"]
    assert answer["seed"].tolist() == [7, 9]
    assert answer["model"].tolist() == ["dfu-sampler/3"] * 2


@pytest.mark.parametrize("seeds", [None, [None, None, None], [float("nan")] * 3])
def test_rows_without_a_seed_count_from_the_requests(model: SamplerModel, seeds: list[object] | None) -> None:
    rows: dict[str, list[object]] = {"phase": ["P", "P", "P"]}
    if seeds is not None:
        rows["seed"] = seeds
    assert ask(model, rows, seed=40)["seed"].tolist() == [40, 41, 42]


def test_given_and_missing_seeds_mix(model: SamplerModel) -> None:
    assert ask(model, {"phase": ["P", "P"], "seed": [5, None]}, seed=10)["seed"].tolist() == [5, 11]


@pytest.mark.parametrize(
    ("rows", "params", "message"),
    [
        (["X"], {}, "phase X is unknown: this model draws I, P, R"),
        (["I"] * 9, {}, "9 rows: a request takes 1 to 8"),
        ([], {}, "0 rows"),
        (["I"], {"guidance_scale": -0.5}, "guidance_scale -0.5"),
        (["I"], {"guidance_scale": float("nan")}, "guidance_scale nan"),
        (["I"], {"num_inference_steps": 0}, "num_inference_steps 0: must be 1 to 1000"),
        (["I"], {"num_inference_steps": 1001}, "num_inference_steps 1001"),
        (["X"], {"guidance_scale": -1}, r"unknown.*; guidance_scale -1"),
        (["I"], {"guidance_scale": 13.0}, "bad luck"),
    ],
)
def test_what_cannot_be_drawn_is_said_so(
    model: SamplerModel, rows: list[object], params: dict[str, float], message: str
) -> None:
    with pytest.raises(MlflowException, match=message) as caught:
        ask(model, {"phase": rows}, **params)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


def test_requests_at_once_are_drawn_one_after_the_other(model: SamplerModel) -> None:
    answers: dict[int, list[tuple[int, ...]]] = {}

    def request(seed: int) -> None:
        answers[seed] = [colour(image) for image in ask(model, {"phase": ["I", "R"]}, seed=seed)["image"]]

    threads = [threading.Thread(target=request, args=(seed,)) for seed in range(0, 40, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {seed: [(0, seed, 15), (2, seed + 1, 15)] for seed in range(0, 40, 5)}
