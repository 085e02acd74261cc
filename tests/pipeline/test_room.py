"""Once training is over its optimizer makes room for what comes next, such as the sampler of a sweep."""

from __future__ import annotations

from pathlib import Path
from weakref import ref

import mlflow
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import merge, validate
from dfu_mlflow.pipeline import run_training
from tests.stores import new_store


@pytest.mark.parametrize("fused", [False, True])
def test_the_optimizer_state_is_gone_before_publishing(
    fused: bool, small_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(new_store(tmp_path))
    change = {"adapter": {"method": "full"}, "train": {"epochs": 1, "fused_backward": fused, "max_grad_norm": None}}
    config = validate(RunConfig, merge(small_config.model_dump(mode="json"), change))
    states: list[ref[torch.Tensor]] = []
    alive: list[int] = []

    def collect(optimizer: torch.optim.Optimizer, *_: object) -> None:
        states.extend(ref(state["exp_avg"]) for state in optimizer.state.values())

    handle = register_optimizer_step_post_hook(collect)
    try:
        run_training(config, publish=lambda _: alive.append(sum(state() is not None for state in states)))
    finally:
        handle.remove()
        mlflow.set_tracking_uri(None)
    assert states
    assert alive == [0]
