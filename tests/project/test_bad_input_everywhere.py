"""Whatever is typed at an entry point that it cannot work with: exit code 2, one sentence, nothing left behind."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import torch
import yaml

from dfu_mlflow import entry
from tests.stores import new_store

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINTS = sorted(yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))["entry_points"])
PHOTOGRAPHS = ["--data.phantom.patients", "12"]

CASES: dict[str, list[tuple[list[str], str]]] = {
    "train": [
        (["--train.epochs", "-1"], "--train.epochs"),
        (["--train.batch_size", "1.5"], "--train.batch_size"),
        (["--train.learning_rate", "nan"], "--train.learning_rate"),
        (["--prompts.phase_prompts", '{"I": '], "--prompts.phase_prompts"),
        (["--prompts.phase_prompts", '{"X": "a"}', *PHOTOGRAPHS], "no prompt for class"),
        (["--sampling.num_inference_steps", "1000000000"], "--sampling.num_inference_steps"),
        (["--config", "broken.yaml"], "broken.yaml"),
        (["--config", "binary.yaml"], "binary.yaml"),
        (["--resume", "pickled", *PHOTOGRAPHS], "pickled"),
        (["stray"], "stray"),
    ],
    "evaluate": [
        (["--source", "nowhere"], "nowhere"),
        (["--source", "models:/dfu-sampler@nobody"], "nobody"),
        (["--source", "models:/dfu-sampler/-1"], "models:/dfu-sampler/-1"),
        (["--source", "pickled"], "pickled"),
        (["--source", "pickle.safetensors"], "pickle.safetensors"),
        (["--source", "broken.json"], "broken.json"),
        (["--weights", "heavy"], "--weights"),
    ],
    "tune": [
        (["--tune.trials", "-4"], "--tune.trials"),
        (["--tune.space", "{"], "--tune.space"),
        (["--tune.storage", "sqlite:////no/such/folder/o.db", *PHOTOGRAPHS], "cannot be opened"),
        (["--tune.kind", "sampling", "--tune.source", "nowhere"], "nowhere"),
        (["--config", "broken.yaml"], "broken.yaml"),
    ],
    "study": [
        (["--plan", "nowhere"], "nowhere"),
        (["--plan", "broken.yaml"], "broken.yaml"),
        (["--plan", "binary.yaml"], "binary.yaml"),
        (["--config", "nowhere"], "nowhere"),
        (["--train.epochs", "-1"], "--train.epochs"),
    ],
    "promote": [
        (["--model", "models:/dfu-sampler@nobody"], "nobody"),
        (["--model", "dfu-sampler"], "dfu-sampler"),
        (["--model", "models:/"], "models:/"),
        (["--rollback", "perhaps"], "--rollback"),
        (["--rollback", "true"], "dfu-sampler"),
    ],
    "diagnose": [
        ([], "--run"),
        (["--checkpoint", "empty"], "holds no weights"),
        (["--checkpoint", "runs"], "runs/0a1b"),
        (["--run", "0" * 32], "0" * 32),
        (["--run", "../../etc"], "../../etc"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--checkpoint", "pickled", "--base_model", "tiny_sdxl"], "pickled"),
        (["--budget", "free"], "--budget"),
    ],
    "sample": [
        (["--model", "models:/dfu-sampler@nobody"], "nobody"),
        (["--model", "models:/dfu-sampler/0"], "models:/dfu-sampler/0"),
        (["--sample.per_class", "1000000000"], "--sample.max_images"),
        (["--sample.counts", '{"I": 1'], "--sample.counts"),
        (["--num_inference_steps", "-1"], "--num_inference_steps"),
        (["--guidance_scale", "inf"], "--guidance_scale"),
        (["--seed", "many"], "--seed"),
    ],
    "serve": [
        (["--model", "models:/dfu-sampler@nobody", "--serve.port", "0"], "nobody"),
        (["--model", "x" * 1_000_000, "--serve.port", "0"], "--model"),
        (["--serve.port", "70000"], "--serve.port"),
        (["--serve.host", "0.0.0.0", "--serve.port", "0"], "DFU_TOKEN"),
        (["--serve.host", "no such host", "--serve.port", "0"], "--serve.host"),
        (["--serve.max_steps", "-1"], "--serve.max_steps"),
    ],
    "test": [
        (["--workers", "two"], "--workers"),
        (["--fast", "perhaps"], "--fast"),
    ],
}
UNKNOWN = [(["--no.such.flag", "1"], "--no.such.flag: unknown"), (["--nothing"], "--nothing")]
SOURCE_FIRST = ("diagnose", "evaluate", "promote")
"""These read flags over the configuration of what they look at, so that is looked up first."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with broken files in it, and an own, empty tracking store beside it."""
    folder = tmp_path_factory.mktemp("bad")
    place = folder / "place"
    (place / "pickled" / "unet").mkdir(parents=True)
    (place / "empty").mkdir()
    (place / "runs" / "0a1b" / "checkpoints").mkdir(parents=True)
    torch.save({"weight": torch.zeros(1)}, place / "pickled" / "weights.safetensors")
    torch.save({"weight": torch.zeros(1)}, place / "pickled" / "unet" / "diffusion_pytorch_model.bin")
    (place / "pickled" / "state.json").write_text(json.dumps({"step": 1}), encoding="utf-8")
    torch.save({"weight": torch.zeros(1)}, place / "pickle.safetensors")
    (place / "broken.yaml").write_text("train: {epochs: [", encoding="utf-8")
    (place / "broken.json").write_text('{"a": ', encoding="utf-8")
    (place / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01" * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.delenv("DFU_TOKEN", raising=False)
        for variable in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(variable, raising=False)
        mlflow.set_tracking_uri(new_store(folder))
        yield place
        mlflow.set_tracking_uri(None)


def test_every_entry_point_has_its_cases() -> None:
    assert sorted(CASES) == ENTRY_POINTS


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        pytest.param(name, *case, id=f"{name}-{' '.join(case[0])[:50]}")
        for name in ENTRY_POINTS
        for case in [*CASES[name], *(UNKNOWN if name not in SOURCE_FIRST else [])]
    ],
)
def test_bad_input_ends_in_one_sentence(
    name: str, flags: list[str], words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    code = entry.run(importlib.import_module(f"entrypoints.{name}").main, flags)
    said = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert said.startswith("error: ")
    assert words in said
    assert len(said) < 5000, "what was typed is not repeated without end"
    assert sorted(place.rglob("*")) == before, "something was left behind"


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_no_stack_trace_reaches_the_terminal(name: str, place: Path) -> None:
    command = [sys.executable, "-m", f"entrypoints.{name}", *CASES[name][0][0]]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=mlflow.get_tracking_uri())
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: ")
