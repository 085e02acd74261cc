"""What the system would kill is refused, with the settings that mend it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dfu_mlflow import entry
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import dump_yaml, merge, validate
from dfu_mlflow.errors import UserError
from dfu_mlflow.memory import GIB
from dfu_mlflow.memory_limits import Limits, free_host_bytes, require_memory
from dfu_mlflow.memory_phases import PhaseMemory, RunMemory, evaluation_memory, run_memory
from dfu_mlflow.runtime import pick_device
from entrypoints import train

CPU = pick_device("cpu")


def limited(config: RunConfig, gib: float, **changes: Any) -> RunConfig:
    return validate(RunConfig, merge(config.model_dump(mode="json"), {"runtime": {"memory_limit_gib": gib}, **changes}))


def test_a_run_that_fits_is_let_through(small_config: RunConfig) -> None:
    assert require_memory(small_config, CPU, run_memory) is None, "a small base is not worth an estimate"
    memory = require_memory(limited(small_config, 64), CPU, run_memory)
    assert memory is not None
    assert [phase.name for phase in memory.phases] == [
        "encoding prompts",
        "caching latents",
        "features of photographs",
        "loading the UNet",
        "training",
        "evaluation",
        "checkpoint",
        "registration",
        "smoke test",
    ]
    assert memory.shared


@pytest.fixture(autouse=True)
def quick_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfu_mlflow.memory_limits.ADVICE_S", 2.0)


@pytest.mark.parametrize("estimate", [run_memory, evaluation_memory])
def test_more_than_is_allowed_is_refused(small_config: RunConfig, estimate: Any) -> None:
    with pytest.raises(UserError, match=r"it would take .* GiB of this machine's memory while .*, and 0\.1 GiB can be"):
        require_memory(limited(small_config, 0.1), CPU, estimate)


def by_average(config: RunConfig, source: str, shared: bool, libraries: float) -> RunMemory:
    """Two gibibytes with an average, one and a half in float32 without, one with neither."""
    size = 2.0 if config.ema.enabled else 1.5 if config.train.mixed_precision == "no" else 1.0
    return RunMemory((PhaseMemory("training", {"UNet": size * GIB}, {}),), shared)


def test_the_settings_that_mend_it_are_named(small_config: RunConfig) -> None:
    full = {"adapter": {"method": "full"}, "ema": {"enabled": True}}
    with pytest.raises(UserError, match=r"it fits with --ema\.enabled false$"):
        require_memory(limited(small_config, 1.6, **full), CPU, by_average)
    with pytest.raises(UserError, match=r"it fits with .*--ema\.enabled false.* --train\.mixed_precision bf16$"):
        require_memory(limited(small_config, 1.1, **full), CPU, by_average)
    with pytest.raises(UserError, match="no setting mends that here"):
        require_memory(limited(small_config, 0.5, **full), CPU, by_average)
    require_memory(limited(small_config, 2.1, **full), CPU, by_average)


def test_a_card_is_asked_as_well(small_config: RunConfig) -> None:
    memory = run_memory(small_config, str(small_config.base_model), shared=False, libraries=GIB)
    assert Limits(small_config, host=64 * GIB, device=24 * GIB).lacking(memory) is None
    lacking = Limits(small_config, host=64 * GIB, device=GIB).lacking(memory)
    assert lacking is not None
    assert "GiB of the card" in lacking


def test_a_process_that_may_take_less_has_less() -> None:
    program = (
        "import resource, dfu_mlflow.memory_limits as limits\n"
        "before = limits.free_host_bytes()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, resource.RLIM_INFINITY))\n"
        "print(before, limits.free_host_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert after < before + 2**20  # what it has itself may grow between the two
    assert after <= 16 * GIB


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text(str(3 * 2**30))
    (tmp_path / "memory.current").write_text(str(2 * 2**30))
    (tmp_path / "memory.stat").write_text(f"anon {2**30}\ninactive_file {2**29}\n")
    monkeypatch.setattr("dfu_mlflow.memory_limits.CGROUPS", ((tmp_path / "memory.max", tmp_path / "memory.current"),))
    whole = free_host_bytes()
    (tmp_path / "memory.max").write_text("max")
    assert whole < free_host_bytes()


def test_the_command_ends_with_2_before_it_starts(
    small_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(limited(small_config, 0.05)))
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    assert entry.run(train.main, ["--config", str(file), "--output_dir", "out"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: it would take ")
    assert "and 0.1 GiB can be had: " in last
    assert not (place / "out").exists()
