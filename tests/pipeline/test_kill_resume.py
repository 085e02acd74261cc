"""A run killed at any moment and resumed equals the unbroken one: weights bit for bit, one MLflow run, one curve."""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import mlflow
import pytest
import torch
from filelock import FileLock
from mlflow import MlflowClient
from safetensors.torch import load_file

from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import merge, validate
from dfu_mlflow.errors import UserError
from dfu_mlflow.pipeline import _claimed_checkpoint, run_training
from tests.stores import new_store

Watch = Callable[[Path], bool]


def child(
    context: multiprocessing.context.ForkServerContext, config: RunConfig, store: str
) -> multiprocessing.process.BaseProcess:
    """A training run in a process whose libraries are loaded already, so that it costs seconds."""
    names = {"CONFIG": config.model_dump_json(), "STORE": store, "FOLDER": str(Path(config.output_dir).parent)}
    return context.Process(target=runpy.run_path, args=(str(Path(__file__).with_name("train_child.py")), names))


@pytest.fixture(scope="module")
def context() -> multiprocessing.context.ForkServerContext:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["dfu_mlflow.pipeline", "mlflow.store.tracking.sqlalchemy_store", "tests.frozen"])
    return server


def checkpoints(out: Path) -> list[str]:
    return sorted(path.parent.name for path in out.glob("*/checkpoints/step-*/state.json"))


def mid_step(out: Path) -> bool:
    """Inside the second epoch: its mid-epoch checkpoint is there, the next one is not begun."""
    return "step-00000016" in checkpoints(out)


def mid_checkpoint(out: Path) -> bool:
    return any(out.glob("*/checkpoints/.partial-step-00000012"))


def mid_evaluation(out: Path) -> bool:
    """The first epoch's last checkpoint is there, its evaluation is not."""
    return "step-00000012" in checkpoints(out)


def kill_when(process: multiprocessing.process.BaseProcess, watch: Watch, out: Path) -> None:
    """SIGKILL the moment `watch` is true."""
    deadline = time.monotonic() + 120
    while not watch(out):
        assert process.is_alive(), f"ended before {watch.__name__}"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def weights(out: Path) -> dict[str, torch.Tensor]:
    (folder,) = out.iterdir()
    return {
        f"{kind}.{name}": value
        for kind in ("weights", "ema", "optimizer")
        for name, value in load_file(folder / "checkpoints" / "step-00000024" / f"{kind}.safetensors").items()
    }


def run(context: multiprocessing.context.ForkServerContext, config: RunConfig, store: str) -> None:
    process = child(context, config, store)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def unbroken(
    context: multiprocessing.context.ForkServerContext,
    small_config_at: Callable[[Path], RunConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, object], Path, str]:
    folder = tmp_path_factory.mktemp("unbroken")
    change = {
        "train": {"steps_per_epoch": 12},
        "checkpoint": {"every_steps": 4},
        "adapter": {"method": "lora", "dropout": 0.2},
    }
    tree = merge(small_config_at(folder).model_dump(mode="json"), change)
    store = new_store(folder)
    run(context, validate(RunConfig, tree), store)
    return tree, folder, store


def curve(store: str, key: str) -> list[tuple[int, float]]:
    client = MlflowClient(store)
    (one,) = client.search_runs([client.get_experiment_by_name("dfu-mlflow").experiment_id])
    assert one.info.status == "FINISHED"
    return [(point.step, point.value) for point in client.get_metric_history(one.info.run_id, key)]


def reported_epochs(store: str) -> list[str]:
    client = MlflowClient(store)
    (one,) = client.search_runs([client.get_experiment_by_name("dfu-mlflow").experiment_id])
    report = Path(client.download_artifacts(one.info.run_id, "report.html")).read_text(encoding="utf-8")
    return re.findall(r"<figcaption>class .; rows are epochs ([\d, ]+)<", report)


@pytest.mark.parametrize("watch", [mid_step, mid_checkpoint, mid_evaluation])
def test_killed_and_resumed_equals_unbroken(
    context: multiprocessing.context.ForkServerContext,
    unbroken: tuple[dict[str, object], Path, str],
    tmp_path: Path,
    watch: Watch,
) -> None:
    tree, folder, store = unbroken
    mine = new_store(tmp_path)
    config = validate(RunConfig, merge(tree, {"output_dir": str(tmp_path / "out"), "resume": "latest"}))
    process = child(context, config, mine)
    process.start()
    kill_when(process, watch, tmp_path / "out")
    run(context, config, mine)

    expected, found = weights(folder / "out"), weights(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    for key in ("step/loss", "val/loss", "train/loss", "epoch", "eval/kid"):
        assert curve(mine, key) == curve(store, key), key
    assert [step for step, _ in curve(mine, "step/loss")] == list(range(1, 25))
    assert reported_epochs(mine) == ["0, 1, 2"] * 3, "a class each: the report shows what came before the kill too"


def test_a_run_that_another_process_trains_is_left_alone(
    unbroken: tuple[dict[str, object], Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, folder, store = unbroken
    (run_folder,) = (folder / "out").iterdir()
    monkeypatch.chdir(folder)
    mlflow.set_tracking_uri(store)
    try:
        before = [(run.info, run.data) for run in mlflow.search_runs(search_all_experiments=True, output_format="list")]
        with FileLock(run_folder / ".training.lock"), pytest.raises(UserError, match="trained by another process"):
            run_training(validate(RunConfig, merge(tree, {"resume": "latest"})))
        after = [(run.info, run.data) for run in mlflow.search_runs(search_all_experiments=True, output_format="list")]
    finally:
        mlflow.set_tracking_uri(None)
    assert [repr(facts) for facts in after] == [repr(facts) for facts in before]


def test_a_run_that_ended_meanwhile_is_resumed_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process wrote a last checkpoint between our look at the folder and the moment it let go of it."""
    first, last = (tmp_path / "out" / "run" / "checkpoints" / f"step-{number:08}" for number in (100, 150))
    first.mkdir(parents=True)
    (first / "state.json").write_text("{}")

    def let_go(folder: Path, _: str) -> AbstractContextManager[None]:
        assert folder == tmp_path / "out" / "run" / ".training.lock"
        last.mkdir()
        (last / "state.json").write_text("{}")
        return nullcontext()

    monkeypatch.setattr("dfu_mlflow.pipeline.alone", let_go)
    config = validate(RunConfig, {"output_dir": str(tmp_path / "out"), "resume": "latest"})
    with ExitStack() as held:
        assert _claimed_checkpoint(config, held) == last
