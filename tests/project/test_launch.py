"""`--launch`: what is typed becomes accelerate's command line; nonsense is told before anything starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin
from torch import nn

from dfu_mlflow.config import RunConfig
from dfu_mlflow.engine_choice import check_launch
from dfu_mlflow.errors import UserError
from dfu_mlflow.launch import FOLDER, launch_names, launch_options
from dfu_mlflow.pipeline import run_training
from dfu_mlflow.zero import ZeroEngine


@pytest.mark.parametrize("name", launch_names())
def test_every_launch_is_a_configuration_that_accelerate_reads(name: str) -> None:
    found = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert found.mixed_precision == "no", "train.mixed_precision decides"
    assert found.main_process_port == 0, "two runs on one machine need ports of their own"
    command = launch_options(name, "3", "cpu")
    assert command is not None
    assert command == ["--config_file", str(FOLDER / f"{name}.yaml"), "--num_processes", "3"]


@pytest.mark.parametrize(
    ("launch", "processes", "message"),
    [
        ("ddpp", "2", "--launch ddpp: unknown; none, ddp, fsdp2, zero2, zero3 are known"),
        ("ddp", "one", "--processes one: a whole number from 2"),
        ("ddp", "1", "--processes 1: a whole number from 2"),
        ("ddp", "", "--processes 2"),
        ("none", "2", "--processes 2 needs --launch"),
    ],
)
def test_what_makes_no_sense_is_told(launch: str, processes: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch_options(launch, processes, "cpu")


def test_a_launched_process_does_not_launch_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launch_options("ddp", "2", "cpu") is None
    monkeypatch.delenv("LOCAL_RANK")
    assert launch_options("none", "", "cpu") is None


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="--processes 3: each needs a GPU of its own, and there are 2"):
        launch_options("ddp", "3", "auto")
    assert launch_options("ddp", "2", "auto") is not None
    assert launch_options("ddp", "3", "cpu") is not None


def test_a_number_of_processes_that_do_not_run_is_refused(small_config: RunConfig) -> None:
    runtime = small_config.runtime.model_copy(update={"num_processes": 4})
    with pytest.raises(UserError, match=r"--runtime.num_processes 4, but 1 run: .* --launch ddp --processes 4"):
        run_training(small_config.model_copy(update={"runtime": runtime}))


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_what_cannot_be_sharded_is_refused_before_the_run(
    variable: str, small_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    train = small_config.train.model_copy(update={"optimizer": "adafactor"})
    with pytest.raises(UserError, match=r"--train.optimizer adafactor .* needs --launch ddp"):
        check_launch(train)


def test_a_stage_of_deepspeed_that_shares_nothing_out_is_refused(
    small_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    with pytest.raises(UserError, match="launch with zero2, zero3 or ddp"):
        check_launch(small_config.train)


def test_compiling_is_refused_with_shards_and_without_a_compiler(
    small_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = small_config.train.model_copy(update={"compile": True})
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"--train.compile needs a C\+\+ compiler"):
        check_launch(train)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"--launch fsdp2 needs --train\.compile false"):
        check_launch(train)


def test_a_deepspeed_file_of_another_stage_is_refused(small_config: RunConfig) -> None:
    plugin = DeepSpeedPlugin({"zero_optimization": {"stage": 1}, "train_batch_size": "auto"})
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    engine = object.__new__(ZeroEngine)
    engine.train, engine.accelerator = small_config.train, accelerator
    with pytest.raises(UserError, match="asks for stage 1, the launcher for 2"):
        engine._settle(nn.Identity())
