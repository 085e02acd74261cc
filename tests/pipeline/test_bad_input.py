"""What cannot be worked with: one line, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dfu_mlflow import entry
from dfu_mlflow.config.measures import EvaluationConfig, SuccessConfig
from dfu_mlflow.verdict import check_names, larger_is_better
from entrypoints import train

Run = Callable[..., str]


@pytest.fixture
def run(
    random_base: Path,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Run]:
    """Type a command in an empty folder; gives back the one line of the error."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def typed(*flags: str) -> str:
        common = ["--base_model", str(random_base), "--data.root", str(photographs), "--data.group_by", r"^P(\d+)"]
        common += ["--device", "cpu"]
        assert entry.run(train.main, [*common, *flags]) == 2
        *_, message = capsys.readouterr().err.splitlines()  # before it, on a slow machine, what the command was at
        assert message.startswith("error: ")
        return message

    yield typed
    assert list(place.iterdir()) == [], "something was left behind"


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("train.epoch", "train.epochs"),
        ("train.lr", "train.learning_rate"),
        ("daata.root", "data.root"),
        ("loss.weight", "loss.perceptual_loss.weight"),
    ],
)
def test_unknown_key(flag: str, hint: str, run: Run) -> None:
    assert f"--{flag}: unknown (did you mean --{hint}?)" in run(f"--{flag}", "3")


UNKNOWN = ("kdi", "eval/kid", "Z/kid", "I/fd", "ssim_progress", "I/kid_progress", "val_lss")


@pytest.mark.parametrize(
    "name", ["kid_high", "kid_progress_low", "I/coverage_low", "kid_dinov2", "fid_progress", "ssim"]
)
def test_every_figure_that_is_logged_may_choose(name: str) -> None:
    asked = EvaluationConfig(best_metric=name, success=SuccessConfig(metric=name, below=1.0))
    check_names(asked, ("I", "P", "R"))
    check_names(asked.model_copy(update={"best_metric": "val_loss_change_high"}), ("I", "P", "R"))
    assert larger_is_better(name) == any(part in name for part in ("progress", "coverage", "ssim"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        *(
            (["--evaluation.best_metric", name], f"--evaluation.best_metric {name}: unknown; there are ")
            for name in UNKNOWN
        ),
        (["--evaluation.success", "{metric: val_loss, below: 1}"], "--evaluation.success.metric val_loss: unknown"),
        (["--registry.name", "a/b:c"], "--registry.name 'a/b:c'"),
        (["--registry.alias", "v2"], "--registry.alias 'v2'"),
        (["--registry.alias", "latest"], "--registry.alias 'latest'"),
        (["--tracking.experiment", ""], "--tracking.experiment"),
        (["--resume", "lastest"], "--resume lastest is no checkpoint: give none, latest, best"),
    ],
)
def test_names_that_would_be_missed_at_the_end_are_refused_at_the_start(flags: list[str], words: str, run: Run) -> None:
    assert words in run(*flags)


def test_wrong_types_and_unknown_keys_are_told_together(run: Run) -> None:
    message = run("--train.epochs", "many", "--sampling.guidance_scale", "-1", "--nothing", "1")
    for part in ("--train.epochs", "--sampling.guidance_scale", "--nothing"):
        assert part in message


def test_guidance_below_zero(run: Run) -> None:
    assert "--sampling.guidance_scale: input should be greater than or equal to 0, got '-3'" in run(
        "--sampling.guidance_scale", "-3"
    )


def test_unknown_configuration(run: Run) -> None:
    assert "neither a preset (" in run("--config", "tinny")


def test_missing_folder(run: Run) -> None:
    assert "--data.root" in run("--data.root", "nowhere")


def test_folder_without_images(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty" / "I").mkdir(parents=True)
    assert "--data.root" in run("--data.root", str(tmp_path / "empty"))


def test_class_with_one_patient(run: Run, photographs: Path, tmp_path: Path) -> None:
    root = tmp_path / "few"
    shutil.copytree(photographs, root)
    first = sorted((root / "R").iterdir())[0].name[:4]
    for path in (root / "R").iterdir():
        if not path.name.startswith(first):
            path.unlink()
    assert "class R" in run("--data.root", str(root))


def test_patients_that_cannot_be_told(run: Run) -> None:
    assert "data.group_by" in run("--data.group_by", "null")


def test_prompt_missing_for_a_class(run: Run) -> None:
    prompts = json.dumps({"I": "a", "P": "b"})
    assert "no prompt for class R" in run("--prompts.phase_prompts", prompts)


def test_resolution_that_the_networks_cannot_halve(run: Run) -> None:
    assert "--data.resolution_px 100 is not divisible by 8" in run("--data.resolution_px", "100")


def test_base_that_is_not_there(run: Run) -> None:
    assert "no such folder" in run("--base_model", "./nowhere")


def test_base_that_is_no_sdxl(run: Run, random_base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(random_base, other)
    config = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps(config | {"addition_embed_type": None}))
    assert "not Stable Diffusion XL" in run("--base_model", str(other))
    (other / "model_index.json").unlink()
    assert "no model_index.json" in run("--base_model", str(other))


def test_resume_from_what_is_no_checkpoint(run: Run, tmp_path: Path) -> None:
    assert "is no checkpoint" in run("--resume", str(tmp_path))


def test_vgg_without_its_weights(run: Run) -> None:
    message = run("--loss.perceptual_loss.enabled", "true", "--loss.perceptual_loss.network", "vgg16")
    assert "--loss.perceptual_loss.weights" in message


def test_checkpoint_of_another_configuration(run: Run, small_config: object, tmp_path: Path) -> None:
    from dfu_mlflow.checkpoint import Checkpoint, CheckpointStore

    config = small_config.model_dump(mode="json")  # type: ignore[attr-defined]
    state = {"step": 1, "config": config, "data": "x", "run_id": "y"}
    folder = CheckpointStore(tmp_path / "c", 1).save(Checkpoint({}, {}, {}, state))
    message = run("--resume", str(folder), "--train.learning_rate", "0.5")
    assert "--train.learning_rate was 0.0003, is 0.5" in message
    assert "--train.batch_size was 4, is 16" in message


def test_full_disk(run: Run, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        assert "GiB free" in run("--output_dir", str(disk / "out"))
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
