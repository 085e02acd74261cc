"""A card to test on, or the CPU in its place where that is asked for, and what is trained there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from dfu_mlflow.checkpoint import CheckpointStore
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import merge, validate
from dfu_mlflow.engine_choice import build_accelerator
from dfu_mlflow.pipeline import build_parts
from dfu_mlflow.preparation import prepare, read_source
from dfu_mlflow.runtime import release_memory
from dfu_mlflow.trainer import Hooks, Trainer
from tests.registry.conftest import bundle, registered, registry_store, run_id

__all__ = ["bundle", "registered", "registry_store", "run_id"]

STAND_IN = "DFU_CUDA_STAND_IN"
"""Environment variable: `cpu` runs the tests' bodies there, so that they are known not to be broken."""

Build = Callable[..., Trainer]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first card."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if os.environ.get(STAND_IN) == "cpu":
        return torch.device("cpu")
    pytest.skip(f"no CUDA device here ({STAND_IN}=cpu runs the bodies on the CPU instead)")


@pytest.fixture(scope="session", autouse=True)
def deterministic_workspace() -> Iterator[None]:
    """cuBLAS reads this once, at its first product."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        yield


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one device and one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    release_memory()


@pytest.fixture
def in_float32() -> Iterator[None]:
    """Convolutions of a card round their inputs to TF32 unless told not to."""
    own: Any = torch.backends.cudnn
    kept, own.conv.fp32_precision = own.conv.fp32_precision, "ieee"
    yield
    own.conv.fp32_precision = kept


@pytest.fixture
def build(small_config_at: Callable[[Path], RunConfig], tmp_path: Path) -> Build:
    """Makes trainers on a device that evaluate nothing: `build(device, folder, section={...})`.

    The newest one decides accelerate's device and precision: finish with a trainer before making another kind.
    """

    def make(
        where: torch.device, folder: str, should_stop: Callable[[], bool] = lambda: False, **sections: Any
    ) -> Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        tree = merge(small_config_at(tmp_path).model_dump(), {"device": str(where), **sections})
        config = validate(RunConfig, tree)
        hooks = Hooks(lambda *_: None, lambda *_: None, lambda: None, should_stop)
        parts = build_parts(config, prepare(config, read_source(config)))
        store = CheckpointStore(tmp_path / folder, 2)
        return Trainer(parts, config, store, hooks, build_accelerator(where, config.train.mixed_precision))

    return make
