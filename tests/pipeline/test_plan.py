"""`--dry-run` says what a run would do, and does nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from dfu_mlflow import entry, plan
from dfu_mlflow.base.load import resolve_base
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import dump_yaml, validate
from dfu_mlflow.pass_timing import PassTimes, time_passes
from entrypoints import train


def test_dry_run(
    small_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(small_config))
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    assert entry.run(train.main, ["--config", str(file), "--dry-run", "--adapter.method", "lora"]) == 0
    printed = capsys.readouterr().out
    resolved = validate(RunConfig, yaml.safe_load(printed.split("# Photographs")[0]))
    assert resolved == small_config.model_copy(
        update={"adapter": small_config.adapter.model_copy(update={"method": "lora"})}
    )
    for part in (
        "class I:",
        "held out",
        "I: diabetic foot ulcer, inflammatory phase",
        "2 epochs of 3 optimizer steps of 4 x 1 samples: 6 steps, 24 samples",
        "with the adapters counted in",
        "# Memory, GiB (this machine's), of one process",
        "largest: ",
        "smoke test",
        "disk for checkpoints: 4 x",
        "# UNet passes\ntraining: 72 (3 a sample)",
        "evaluation in full at epoch 0, 1 and 2",
        "estimated for one process, from a short timing on cpu",
        "caching ",
    ):
        assert part in printed, part
    assert list(place.iterdir()) == []
    assert not (tmp_path / "out").exists()


def test_a_base_of_the_hub_is_said_to_be_fetched(
    small_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(small_config))
    monkeypatch.chdir(tmp_path)
    hub = "stabilityai/stable-diffusion-xl-base-1.0"
    assert entry.run(train.main, ["--config", str(file), "--dry-run", "--base_model", hub]) == 0
    assert f"base {hub} is no folder here: it is fetched from the hub" in capsys.readouterr().out


def test_a_device_without_room_is_said_in_place_of_hours(
    small_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> PassTimes:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB")

    monkeypatch.setattr(plan, "time_passes", full)
    plan.print_plan(small_config)
    assert "hours are not estimated: cpu has no room to time a pass (CUDA out of memory" in capsys.readouterr().out


def test_hours_are_passes_times_seconds(
    small_config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "time_passes", lambda *_: PassTimes(pass_s=600.0, encode_s=0.0, decode_s=0.0))
    plan.print_plan(small_config)
    # 72 of training; base, and two epochs of both weights: 12 pictures x 2 steps x 2, and 6 x 4 on the grid
    assert "caching 0.0 min, training 12.0 h, evaluation 60.0 h" in capsys.readouterr().out


def test_a_pass_of_another_size_is_timed_and_scaled(small_config: RunConfig) -> None:
    base = resolve_base(small_config.base_model)
    device = torch.device("cpu")
    small = time_passes(small_config, base, device)
    larger = small_config.model_copy(update={"data": small_config.data.model_copy(update={"resolution_px": 256})})
    large = time_passes(larger, base, device)
    assert 0 < small.pass_s < large.pass_s
    assert 0 < small.encode_s < large.encode_s
    assert 0 < small.decode_s < large.decode_s
