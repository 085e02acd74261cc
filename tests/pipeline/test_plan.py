"""`--dry-run` says what a run would do, and does nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dfu_mlflow import entry
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import dump_yaml, validate
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
        "activations",
        "disk for checkpoints: 4 x",
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
