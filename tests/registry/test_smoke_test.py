"""Registering draws nothing; a process of its own does afterwards, and what it finds is written on the version."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.pyfunc.model import PythonModel

from dfu_mlflow.config import RunConfig
from dfu_mlflow.participant import TrainingResult
from dfu_mlflow.sampling import Sampler
from registry.package import RegisteredSampler, register_sampler
from registry.publish import SMOKE_TEST_TAG, publish, try_registered

CONFIG = RunConfig()


def test_registering_loads_no_sampler(bundle: Path, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training is still in memory then: a second network beside it is what the system kills a run for."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a sampler was loaded while registering")

    monkeypatch.setattr(Sampler, "load", refuse)
    monkeypatch.setattr(PythonModel, "load_context", refuse)
    monkeypatch.setattr(mlflow.pyfunc, "load_model", refuse)
    version = register_sampler(bundle, CONFIG, run_id, {}, {})
    monkeypatch.undo()
    model = mlflow.pyfunc.load_model(version.uri)
    assert model.metadata.signature is not None
    assert list(model.input_example["phase"]) == ["I", "P", "R"], "the example is given, not predicted"


@pytest.mark.slow
def test_what_the_smoke_test_found_is_on_the_version(
    registered: RegisteredSampler, bundle: Path, run_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try_registered(registered, CONFIG)
    client = MlflowClient()
    tags = client.get_model_version(registered.name, str(registered.version)).tags
    assert tags[SMOKE_TEST_TAG].startswith(f"passed: {registered.uri} loaded and drew I in a process of its own")

    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    torch.save({"conv_in.weight": torch.zeros(1)}, broken / "weights.safetensors")
    version = register_sampler(broken, CONFIG, run_id, {}, {})
    try_registered(version, CONFIG)
    found = client.get_model_version(version.name, str(version.version))
    assert found.tags[SMOKE_TEST_TAG].startswith(f"failed: {version.uri} does not load and draw")
    assert found.description.startswith("**This version does not draw.**")
    assert f"{version.name} version {version.version} stays registered" in capsys.readouterr().err


def test_the_figures_are_those_of_the_weights_that_were_chosen(
    bundle: Path, run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"eval/kid": 2.257, "eval/fd": 1030.0, "eval_ema/kid": 2.238, "eval_ema/fd": 1024.0, "val_ema/loss": 0.5}
    result = TrainingResult(run_id, bundle.parent, bundle, 2, "ema", figures, "met")
    version = publish(result, CONFIG)
    assert version is not None
    assert "best: epoch 2, ema weights, fd 1024, kid 2.238" in capsys.readouterr().out
    tags = MlflowClient().get_model_version(version.name, str(version.version)).tags
    assert {name: float(tags[name]) for name in ("eval/kid", "eval/fd", "val/loss")} == {
        "eval/kid": 2.238,
        "eval/fd": 1024.0,
        "val/loss": 0.5,
    }
