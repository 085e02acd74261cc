"""`benchmarks.cuda` on a small base on the CPU: every line but those that speak to a card, and what a hurry does."""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from accelerate.state import AcceleratorState
from mlflow import MlflowClient

from benchmarks import cuda
from benchmarks.cuda import Bench, Estimate, chosen, held_against, lacks_memory, run_one
from benchmarks.cuda_cases import BASE, CASES, Request, case_config, find
from benchmarks.cuda_child import run_case
from benchmarks.cuda_flops import picture_flops
from benchmarks.cuda_lines import lines
from benchmarks.cuda_memory import Peaks, planned_gib

Figures = dict[str, Any]
GIB = 2**30

pytestmark = pytest.mark.skipif(
    os.environ.get("DFU_CUDA_STAND_IN") != "cpu",
    reason="minutes of training for a benchmark of cards: DFU_CUDA_STAND_IN=cpu runs it on the CPU",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the benchmark, with a small base."""
    made = tmp_path_factory.mktemp("benchmark")
    figures: list[Figures] = []
    run_case(request(made, BASE), figures.append)
    assert figures[0]["bf16_flops_per_s"] > 0
    assert figures[1]["phases"]["make the base"]["host_gib"] > 0
    return made


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def request(folder: Path, case: str) -> Request:
    high = case != BASE and find(case).high
    return Request(case, str(folder), "cpu", 128 if high else 64, 0.01, small=True)


def measured(folder: Path, case: str) -> Figures:
    """All figures of a case."""
    found: list[Figures] = []
    run_case(request(folder, case), found.append)
    return {name: value for figures in found for name, value in figures.items()}


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("case", ["lora_12gb@low", "full_24gb@high", "lora@low"])
def test_steps_are_measured_and_held_against_plan_and_rate(folder: Path, case: str) -> None:
    figures = measured(folder, case)
    assert figures["steps"] >= 2
    assert figures["skipped_steps"] == 0
    config = case_config(request(folder, case))
    pictures = config.train.batch_size * config.train.gradient_accumulation_steps
    assert figures["images_per_s"] == pytest.approx(pictures / figures["step_s"])
    assert set(figures["phases"]) == {"load and cache", "build", "first step", "steps"}
    bench = Bench(Namespace(small=True), folder, 0.0, rate=1e12)
    promised: Future[Estimate] = Future()
    promised.set_result(Estimate(2.0, 1e9, 3e9))
    figures["phases"]["steps"]["allocated_gib"] = 1.5  # as a card would have it
    held = held_against({"case": case, **figures}, promised, bench)
    assert held["bf16_share"] == pytest.approx(figures["images_per_s"] * 3e9 / 1e12)
    assert (held["steps_over_plan"], held["peak_gib"]) == (0.75, 1.5)
    said = "\n".join(lines(held))
    assert "plan 2.00 GiB, the steps' tensors 0.75 of it, highest of any phase 1.50 GiB" in said
    assert "tensors 1.50 GiB" in said


def test_pictures_and_updates_are_measured(folder: Path) -> None:
    figures = measured(folder, "sample@low")
    assert figures["pictures_per_s"] > 0
    assert figures["unet_passes"] == 2 * figures["solver_steps"]
    updates: list[Figures] = []
    run_case(request(folder, "optimizers"), updates.append)
    by_name = {found["optimizer"]: found for found in updates}
    assert set(by_name) == {"adamw", "adamw, foreach", "adamw_8bit", "adafactor"}
    for found in by_name.values():
        if "skipped" not in found:
            assert found["state_gib"] == pytest.approx(found["planned_state_gib"], rel=0.02, abs=2e-6), found


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_the_chain_trains_registers_and_samples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    try:
        figures = measured(folder, "chain")
        assert MlflowClient().get_model_version_by_alias("dfu-sampler", "challenger")
    finally:
        mlflow.set_tracking_uri(None)
    wanted = {"load and cache", "build", "evaluate", "train", "checkpoints", "register", "sample"}
    assert set(figures["phases"]) == wanted
    assert all(phase["seconds"] > 0 for phase in figures["phases"].values())
    assert figures["sampled"] == 6
    assert figures["complete"]


def test_a_base_of_the_small_architecture_has_the_real_ones_blocks(folder: Path) -> None:
    config = json.loads((folder / "base" / "unet" / "config.json").read_text(encoding="utf-8"))
    assert config["addition_embed_type"] == "text_time"
    assert len(list((folder / "base").rglob("*.safetensors"))) == 4
    forward, step = picture_flops(case_config(request(folder, "full_24gb@high")))
    assert 2.5 < step / forward < 3.2, "a backward pass is two products for each of the forward pass's"
    frozen, adapted = picture_flops(case_config(request(folder, "lora@high")))
    assert 1.8 < adapted / frozen < 2.6, "frozen weights need no gradient"
    assert planned_gib(case_config(request(folder, "lora@low"))) > 0


def bench(folder: Path, minutes: float, tell: list[Figures]) -> tuple[Bench, Callable[[Figures], None]]:
    options = Namespace(small=True, device="cpu")
    return Bench(options, folder, time.monotonic() + 60 * minutes), tell.append


def test_what_runs_out_of_time_is_cut_off_and_said(folder: Path) -> None:
    told: list[Figures] = []
    running, tell = bench(folder, 0.01, told)
    start_s = time.monotonic()
    run_one(running, find("lora@low"), None, tell)
    assert time.monotonic() - start_s < 5, "the child was not waited for"
    assert told == [{"case": "lora@low", "cut_off": "the time is up (--minutes)"}]
    assert running.outcomes == {"lora@low": "cut off"}
    assert list(lines(told[0])) == ["lora@low: cut off: the time is up (--minutes)"]


@pytest.mark.parametrize(
    ("figures", "code", "outcome", "said"),
    [
        ([{"start_s": 7.0}], 1, "failed", "lora@low: failed: exit code 1"),
        ([{"skipped": "--train.optimizer adamw_8bit needs a package"}], 2, "skipped", "lora@low: skipped: --train.opt"),
        ([{"out_of_memory": "tried to allocate"}], 3, "out of memory", "lora@low: out of memory: tried to allocate"),
        (
            [{"optimizer": "adamw_8bit", "skipped": "no package"}],
            0,
            "measured",
            "lora@low adamw_8bit: skipped: no pack",
        ),
    ],
)
def test_how_a_child_ended_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: list[Figures], code: int, outcome: str, said: str
) -> None:
    def child(
        _: Request, environment: dict[str, str], log: Path, limit_s: float, take: Callable[[Figures], None]
    ) -> int:
        assert environment["MLFLOW_TRACKING_URI"].startswith(f"sqlite:///{tmp_path}")
        assert 0 < limit_s <= 300
        log.write_text("Traceback: its last words", encoding="utf-8")
        for found in figures:
            take(found)
        return code

    monkeypatch.setattr(cuda, "run_child", child)
    told: list[Figures] = []
    running, tell = bench(tmp_path, 5.0, told)
    run_one(running, find("lora@low"), None, tell)
    assert running.outcomes == {"lora@low": outcome}
    printed = list(lines(told[-1]))
    assert printed[0].startswith(said)
    assert ("Traceback: its last words" in printed) == (outcome == "failed")
    assert running.start_s == (7.0 if "start_s" in figures[0] else 0.0)


@pytest.mark.slow
def test_the_program_prints_and_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures" / "cuda.jsonl"
    options = ["--device", "cpu", "--small", "--json", str(file), "--folder", str(tmp_path), "--minutes", "20"]
    assert cuda.main([*options, "--cases", "optimizers", "sample@low"]) == 0
    written = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [found["case"] for found in written][:3] == ["machine", "base", "base"]
    assert {found["case"] for found in written} == {"machine", "base", "optimizers", "sample@low"}
    (pictures,) = (found for found in written if "pictures_per_s" in found)
    assert 0 < pictures["bf16_share"] < 1
    printed = capsys.readouterr().out
    assert "base: measured; sample@low: measured; optimizers: measured" in printed
    assert "of the bf16 rate" in printed
    assert list(tmp_path.iterdir()) == [file.parent], "the base is gone"


def test_what_does_not_fit_is_not_begun(folder: Path) -> None:
    running, _ = bench(folder, 2.0, [])
    running.start_s = 40.0
    assert running.lacks_time(find("lora@low")) == ""
    assert "it would take about" in running.lacks_time(find("compile@low"))
    promised: Future[Estimate] = Future()
    case = find("full@high")
    assert lacks_memory(case, promised, 24.0) == "", "its plan is not known yet"
    promised.set_result(Estimate(39.5, 1.0, 3.0))
    assert lacks_memory(case, promised, 24.0) == "the plan is 39.5 GiB, the card has 24.0"
    assert lacks_memory(case, promised, 80.0) == lacks_memory(case, promised, None) == ""


def test_cases_are_chosen_by_how_their_names_begin() -> None:
    assert chosen([]) == list(CASES)
    assert [case.name for case in chosen(["sample", "lora@low"])] == ["sample@high", "sample@low", "lora@low"]
    with pytest.raises(SystemExit, match="--cases lorra: no such case; there are lora_12gb@low"):
        chosen(["lorra"])


def test_without_a_card_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert cuda.main([]) == 2
    assert "--device cpu --small" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cuda.main(["--device", "cpu"])


def test_peaks_are_those_of_their_phase_and_parts_of_a_phase_are_not_told_apart() -> None:
    peaks = Peaks(torch.device("cpu"))
    with peaks.phase("small"):
        pass
    with peaks.phase("large"), peaks.phase("part"):
        kept = torch.ones(2**26)  # 256 MiB, touched
        time.sleep(0.5)
    assert set(peaks.phases) == {"small", "large"}
    risen = peaks.phases["large"]["host_gib"] - peaks.phases["small"]["host_gib"]
    assert risen == pytest.approx(kept.nbytes / GIB, abs=0.05)
    before = peaks.phases["large"]["seconds"]
    with pytest.raises(ValueError, match="out"), peaks.phase("large"):
        raise ValueError("out")
    assert peaks.phases["large"]["seconds"] > before
