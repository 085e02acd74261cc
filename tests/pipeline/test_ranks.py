"""Many ranks do what one does, to the same figures; and a rank that is missing is named, and soon."""

from __future__ import annotations

import multiprocessing
import runpy
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from dfu_mlflow.checkpoint import load_checkpoint
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import merge, validate
from tests.stores import new_store

Change = dict[str, Any]
STEPS = 20


class Launch:
    """Starts a training run in processes that find the variables a launcher sets, and whose libraries are loaded."""

    def __init__(self, configure: Callable[[Path], RunConfig], folder: Path, ranks: int) -> None:
        self.folder, self.ranks = folder, ranks
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "mlflow.db").exists():
            new_store(folder)
        self.tree = configure(folder).model_dump(mode="json")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["dfu_mlflow.pipeline", "mlflow.store.tracking.sqlalchemy_store", "tests.frozen"]
        )

    def __call__(
        self, change: Change, environment: Mapping[str, str] | None = None, dies: str = "", after: int = 0
    ) -> list[int]:
        """Run to the end; gives back the exit codes. `dies` is the signal that the last rank sends itself in
        sampling, `after` so many batches; HANG sleeps there for good."""
        config = validate(RunConfig, merge(self.tree, change)).model_dump_json()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        processes = []
        for rank in range(self.ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks)}
            place |= {"LOCAL_WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            names = {"CONFIG": config, "FOLDER": str(self.folder), "DIES": dies if rank == self.ranks - 1 else ""}
            names |= {"AFTER": str(after)}
            names |= {"ENVIRONMENT": {**place, **(environment or {}), "OMP_NUM_THREADS": "1"} if self.ranks > 1 else {}}
            child = str(Path(__file__).with_name("ranks_child.py"))
            processes.append(self.context.Process(target=runpy.run_path, args=(child, names)))
        for process in processes:
            process.start()
        for process in processes:
            process.join(120 if process is processes[0] else 20)
            if process.is_alive():  # what a launcher does
                process.kill()
                process.join()
        return [process.exitcode if process.exitcode is not None else -1 for process in processes]

    @property
    def client(self) -> MlflowClient:
        """Of the runs' store."""
        return MlflowClient(f"sqlite:///{self.folder}/mlflow.db")

    def run(self) -> Run:
        """The only MLflow run."""
        experiment = self.client.get_experiment_by_name("dfu-mlflow")
        (run,) = self.client.search_runs([experiment.experiment_id])
        return run

    def curve(self, key: str) -> list[tuple[int, float]]:
        """Points of a metric."""
        return [(point.step, point.value) for point in self.client.get_metric_history(self.run().info.run_id, key)]


CHANGE: Change = {
    "train": {
        "epochs": 2,
        "steps_per_epoch": STEPS // 2,
        "gradient_accumulation_steps": 2,
        "lr_schedule": "constant",  # a run of one epoch is then the beginning of a run of two
    },
    "sampling": {"batch_size": 4},
    "runtime": {"timeout_s": 30},
}

ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    "DS_ACCELERATOR": "cpu",
}

ZERO3 = {**ZERO2, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

sharded = pytest.mark.parametrize("launcher", [ZERO2, ZERO3, FSDP2], ids=["zero2", "zero3", "fsdp2"])


@pytest.fixture(scope="module")
def alone(small_config_at: Callable[[Path], RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """The run of one process that the others are held to."""
    launch = Launch(small_config_at, tmp_path_factory.mktemp("alone"), 1)
    assert launch(CHANGE) == [0]
    return launch


def same(one: Launch, other: Launch, key: str, tolerance: float) -> None:
    """Two runs show one curve."""
    first, second = one.curve(key), other.curve(key)
    assert [step for step, _ in first] == [step for step, _ in second]
    assert [value for _, value in first] == pytest.approx([value for _, value in second], rel=tolerance), key


def test_two_ranks_learn_and_measure_what_one_does(
    small_config_at: Callable[[Path], RunConfig], alone: Launch, tmp_path: Path
) -> None:
    pair = Launch(small_config_at, tmp_path / "pair", 2)
    assert pair(CHANGE) == [0, 0]
    assert len(pair.curve("step/loss")) == STEPS
    same(alone, pair, "step/loss", 1e-5)
    same(alone, pair, "val/loss", 1e-5)
    for key in ("eval/fd", "eval/kid", "eval/kid_low", "model/displacement"):
        before, after = alone.curve(key), pair.curve(key)
        assert before, key
        assert before[0] == after[0], f"{key}: the untouched base is the same to the bit"
        same(alone, pair, key, 1e-4)
    tags = pair.run().data.tags
    assert tags["draws.rank0"] != tags["draws.rank1"]
    assert pair.run().data.params["cfg/runtime.num_processes"] == "2"


def test_a_run_goes_on_with_another_number_of_ranks(
    small_config_at: Callable[[Path], RunConfig], alone: Launch, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    assert Launch(small_config_at, folder, 2)(merge(CHANGE, {"train": {"epochs": 1}})) == [0, 0]
    resumed = Launch(small_config_at, folder, 1)
    assert resumed(merge(CHANGE, {"resume": "latest"})) == [0]
    assert len(resumed.curve("step/loss")) == STEPS
    same(alone, resumed, "step/loss", 1e-5)


def test_four_ranks_learn_what_one_does(
    small_config_at: Callable[[Path], RunConfig], alone: Launch, tmp_path: Path
) -> None:
    four = Launch(small_config_at, tmp_path / "four", 4)
    assert four(merge(CHANGE, {"train": {"epochs": 1}, "ema": {"enabled": False}})) == [0] * 4
    before, after = alone.curve("step/loss")[: STEPS // 2], four.curve("step/loss")
    assert [value for _, value in after] == pytest.approx([value for _, value in before], rel=1e-5)


def test_a_rank_killed_in_evaluation_ends_the_run_with_its_name(
    small_config_at: Callable[[Path], RunConfig], tmp_path: Path
) -> None:
    pair = Launch(small_config_at, tmp_path / "killed", 2)
    assert pair(CHANGE, dies="SIGKILL") == [2, -9]
    run = pair.run()
    died_s = (pair.folder / "died").stat().st_mtime
    assert run.info.end_time / 1000 - died_s < CHANGE["runtime"]["timeout_s"]
    assert run.info.status == "FAILED"
    assert "rank 1 of 2 ended without a word" in run.data.tags["exit.reason"]


def test_a_rank_that_hangs_in_evaluation_ends_the_run_with_its_name(
    small_config_at: Callable[[Path], RunConfig], tmp_path: Path
) -> None:
    pair = Launch(small_config_at, tmp_path / "stuck", 2)
    codes = pair(merge(CHANGE, {"runtime": {"timeout_s": 20}}), dies="HANG")
    assert codes[0] == 2
    reason = pair.run().data.tags["exit.reason"]
    assert "rank 1 of 2 did not arrive at" in reason
    assert "within 20 s" in reason


def test_a_batch_that_cannot_be_shared_is_refused(small_config_at: Callable[[Path], RunConfig], tmp_path: Path) -> None:
    assert Launch(small_config_at, tmp_path / "odd", 2)(merge(CHANGE, {"train": {"batch_size": 3}})) == [2, 2]
    told = (tmp_path / "odd" / "rank0.err").read_text(encoding="utf-8")
    assert "--train.batch_size 3 cannot be shared equally by 2 processes: take 4" in told


@sharded
def test_shards_train_checkpoint_resume_and_evaluate(
    small_config_at: Callable[[Path], RunConfig], alone: Launch, tmp_path: Path, launcher: Mapping[str, str]
) -> None:
    pair = Launch(small_config_at, tmp_path / "shards", 2)
    stopped = merge(CHANGE, {"resume": "latest", "checkpoint": {"every_steps": 6}})
    assert pair(stopped, launcher, dies="SIGKILL", after=2) == [2, -9]
    assert pair(stopped, launcher) == [0, 0]
    same(alone, pair, "step/loss", 1e-5)
    for key in ("val/loss", "val_ema/loss", "eval/fd", "eval_ema/fd", "model/displacement"):
        same(alone, pair, key, 1e-4)
    assert alone.run().data.params["trainable_fraction"] == pair.run().data.params["trainable_fraction"]


@pytest.mark.parametrize("launcher", [ZERO3, FSDP2], ids=["zero3", "fsdp2"])
def test_adapters_in_shards_go_on_in_one_process_and_back(
    small_config_at: Callable[[Path], RunConfig], tmp_path: Path, launcher: Mapping[str, str]
) -> None:
    train = {"epochs": 3, "steps_per_epoch": 3}
    whole = merge(CHANGE, {"adapter": {"method": "lora", "rank": 3}, "train": train, "resume": "latest"})
    one = Launch(small_config_at, tmp_path / "one", 1)
    assert one(whole) == [0]
    folder = tmp_path / "changing"
    pair, single = Launch(small_config_at, folder, 2), Launch(small_config_at, folder, 1)
    assert pair(merge(whole, {"train": {"epochs": 1}}), launcher) == [0, 0]
    assert single(merge(whole, {"train": {"epochs": 2}})) == [0]
    assert pair(whole, launcher) == [0, 0]
    assert len(pair.curve("step/loss")) == 9
    same(one, pair, "step/loss", 1e-5)
    same(one, pair, "model/displacement", 1e-4)


@sharded
def test_shards_skip_a_step_that_is_not_finite_and_name_all_its_photographs(
    small_config_at: Callable[[Path], RunConfig], tmp_path: Path, launcher: Mapping[str, str]
) -> None:
    pair = Launch(small_config_at, tmp_path / "blown", 2)
    train = {"learning_rate": 1e30, "max_nonfinite_steps": 2}  # the first update ends the network
    change = merge(CHANGE, {"train": train, "checkpoint": {"every_steps": 1, "keep_last": 3}})
    assert pair(change, launcher) == [2, 2]
    reason = pair.run().data.tags["exit.reason"]
    assert "not finite for 2 steps in a row, last at step 3 on " in reason
    assert reason.count("[private]") > 4, "one process has four of the step's eight"
    before, after = (
        load_checkpoint(next(pair.folder.glob(f"out/*/checkpoints/*{step}"))).weights for step in ("1", "2")
    )
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@sharded
def test_shards_in_bf16_with_the_perceptual_term_learn_what_one_process_does(
    small_config_at: Callable[[Path], RunConfig], tmp_path: Path, launcher: Mapping[str, str]
) -> None:
    term = {"loss": {"perceptual_loss": {"enabled": True, "max_timestep": 1000}}}
    change = merge(merge(CHANGE, term), {"train": {"epochs": 1, "steps_per_epoch": 3, "mixed_precision": "bf16"}})
    one, pair = Launch(small_config_at, tmp_path / "one", 1), Launch(small_config_at, tmp_path / "pair", 2)
    assert one(change) == [0]
    assert pair(change, launcher) == [0, 0]
    same(one, pair, "step/loss", 1e-2)
    ((_, share),) = pair.curve("train/grad_share_perceptual")  # the mean of each rank's own, so not that of one process
    assert 0 < share < 1


@pytest.mark.parametrize("launcher", [ZERO3, FSDP2], ids=["zero3", "fsdp2"])
def test_a_frozen_base_in_bf16_is_shared_out_beside_its_adapters(
    small_config_at: Callable[[Path], RunConfig], tmp_path: Path, launcher: Mapping[str, str]
) -> None:
    adapter = {"method": "lora", "rank": 3, "frozen_dtype": "bfloat16"}
    train = {"epochs": 1, "steps_per_epoch": 3, "mixed_precision": "bf16"}
    change = merge(CHANGE, {"adapter": adapter, "train": train})
    one, pair = Launch(small_config_at, tmp_path / "one", 1), Launch(small_config_at, tmp_path / "pair", 2)
    assert one(change) == [0]
    assert pair(change, launcher) == [0, 0]
    same(one, pair, "step/loss", 1e-2)
    same(one, pair, "val/loss", 1e-2)
