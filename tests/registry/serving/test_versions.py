"""The alias is followed without a restart; a version that does not load leaves the old one serving."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from dfu_mlflow.config import RunConfig
from dfu_mlflow.sampling import Sampler
from registry.package import RegisteredSampler, register_sampler

from .conftest import Running, Serving

CONFIG = RunConfig()


def changed(bundle: Path, folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a bundle with other weights."""
    shutil.copytree(bundle, folder)
    weights = load_file(bundle / "weights.safetensors")
    save_file({name: change(weight) for name, weight in weights.items()}, folder / "weights.safetensors")
    return folder


def repeated(model_input: list[str]) -> list[str]:
    return model_input


def point(version: RegisteredSampler) -> None:
    MlflowClient().set_registered_model_alias(version.name, "champion", str(version.version))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def outcomes(server: Running) -> str:
    return server.ask("GET", "/metrics").body.decode()


def test_alias_is_followed_and_nobody_is_refused_meanwhile(
    serving: Serving, registered: RegisteredSampler, bundle: Path, run_id: str, tmp_path: Path
) -> None:
    folder = changed(bundle, tmp_path / "second", lambda weight: weight * 0.5)
    second = register_sampler(folder, CONFIG, run_id, {}, {})
    seen: list[tuple[int, str, bytes]] = []
    ended = threading.Event()

    with serving() as server:

        def ask_on() -> None:
            while not ended.is_set():
                answer = server.draw("P", 4)
                seen.append((answer.status, answer.json["rows"][0]["model"], answer.body))

        client = threading.Thread(target=ask_on)
        client.start()
        point(second)
        wait_until(lambda: bool(seen) and seen[-1][1] == "dfu-sampler/2")
        ended.set()
        client.join()
        np.testing.assert_array_equal(server.draw("P", 4).pictures, Sampler.load(folder, "cpu").draw(["P"], [4]))
        point(registered)
        wait_until(lambda: server.draw("P", 4).json["rows"][0]["model"] == "dfu-sampler/1")
    assert {status for status, _, _ in seen} == {200}
    assert len({body for _, model, body in seen if model == "dfu-sampler/1"}) <= 1
    assert len({body for _, model, body in seen}) == len({model for _, model, _ in seen})


@pytest.mark.parametrize("broken", ["weights of another model", "no sampler"])
def test_a_version_that_does_not_load_leaves_the_old_one_serving(
    broken: str, serving: Serving, registered: RegisteredSampler, bundle: Path, run_id: str, tmp_path: Path
) -> None:
    if broken == "no sampler":
        with mlflow.start_run(run_id=run_id):
            logged = mlflow.pyfunc.log_model(name="other", python_model=repeated, pip_requirements=["mlflow"])
        made = mlflow.register_model(logged.model_uri, registered.name)
        version = RegisteredSampler(registered.name, int(made.version), logged.model_uri)
    else:
        folder = changed(bundle, tmp_path / "broken", lambda weight: weight.flatten()[:1])
        version = register_sampler(folder, CONFIG, run_id, {}, {})
    with serving() as server:
        point(version)
        wait_until(lambda: 'dfu_model_loads_total{outcome="failed"} 1.0' in outcomes(server))
        answer = server.draw("I", 3)
        assert (answer.status, answer.json["rows"][0]["model"]) == (200, f"dfu-sampler/{registered.version}")
        np.testing.assert_array_equal(answer.pictures, Sampler.load(bundle, "cpu").draw(["I"], [3]))
        assert server.ask("GET", "/ready").status == 200
        MlflowClient().delete_registered_model_alias(registered.name, "champion")
        time.sleep(0.5)
        assert server.draw("I", 3).status == 200, "a registry that does not answer is no reason to stop"
        point(registered)
