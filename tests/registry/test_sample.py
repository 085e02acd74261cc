"""A folder of synthetic pictures from a registered model: balanced, filtered, resumable."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounter

from dfu_mlflow.config import RunConfig, load
from dfu_mlflow.config.load import merge, validate
from dfu_mlflow.config.sample import SampleConfig
from dfu_mlflow.data import evaluation_pixels
from dfu_mlflow.errors import UserError
from dfu_mlflow.preparation import read_source
from dfu_mlflow.sampling import Sampler
from registry import sample_folder
from registry.package import ROOT, RegisteredSampler
from registry.picture_checks import Photographs, PictureChecks
from registry.sample import sample
from registry.sample_folder import check_folder
from registry.source import locate
from tests.registry.contenders import contest_config, material_of, register, undamaged

OPEN = ["--sample.filter_copies", "false"]
DOUBTFUL = ["--memorisation.threshold", "0.9", "--memorisation.tail", "0.4", "--sample.max_draws_ratio", "20"]
"""A threshold so high that many pictures count as copies: they are dropped and drawn again."""


def config(folder: Path, *flags: str) -> SampleConfig:
    own = ["--output_dir", str(folder), "--sample.per_class", "2", "--device", "cpu"]
    return load(SampleConfig, None, [*own, *flags])


def rows_of(folder: Path, name: str = "manifest.csv") -> list[dict[str, str]]:
    with (folder / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_folder_is_balanced_and_every_picture_can_be_drawn_again(
    registered: RegisteredSampler, bundle: Path, tmp_path: Path
) -> None:
    done = sample(config(tmp_path, *OPEN, "--num_inference_steps", "2"))
    rows = rows_of(tmp_path)
    assert done.complete
    assert [row["class"] for row in rows] == ["I", "I", "P", "P", "R", "R"]
    assert {row["model"] for row in rows} == {f"{registered.name}/{registered.version}"}
    assert len({row["seed"] for row in rows}) == 6
    again = Sampler.load(bundle, "cpu").draw(
        [row["class"] for row in rows], [int(row["seed"]) for row in rows], num_inference_steps=2
    )
    for row, expected in zip(rows, again, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / row["path"])), expected)
    assert "copies may be among these: the version does not tell which photographs" in done.sentences[0]
    assert rows[0]["nearest_similarity"] == ""


@pytest.mark.usefixtures("registered")
def test_each_picture_says_what_it_is(tmp_path: Path) -> None:
    sample(config(tmp_path, *OPEN, "--sample.counts", "{R: 1}", "--guidance_scale", "2.5"))
    (row,) = rows_of(tmp_path)
    text = Image.open(tmp_path / row["path"]).text  # type: ignore[attr-defined]
    assert text.pop("Comment").startswith("synthetic picture")
    shown = ("class", "seed", "guidance_scale", "num_inference_steps", "scheduler", "model")
    assert text == {f"dfu:{name}": row[name] for name in shown}
    assert (row["class"], row["guidance_scale"], row["num_inference_steps"]) == ("R", "2.5", "3")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed", "1"], "seed was 0, now 1"),
        (["--guidance_scale", "5"], "guidance_scale was 2.0, now 5.0"),
        (["--sample.per_class", "3"], "counts was"),
    ],
)
def test_a_folder_of_other_settings_is_left_alone(tmp_path: Path, flags: list[str], said: str) -> None:
    sample(config(tmp_path, *OPEN))
    before = content(tmp_path)
    with pytest.raises(UserError, match=said):
        sample(config(tmp_path, *OPEN, *flags))
    assert content(tmp_path) == before


@pytest.mark.usefixtures("registered")
def test_a_folder_with_somebody_elses_samples_is_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").touch()
    with pytest.raises(UserError, match="--output_dir"):
        sample(config(tmp_path, *OPEN))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("model", ["dfu-sampler", "models:/dfu-sampler@no", "models:/dfu-sampler/99", "models:/x/1"])
def test_what_is_not_registered_is_told(model: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=model) as caught:
        sample(config(tmp_path / "new", "--model", model))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sample.per_class", "1000000000"], "1,000,000,000 pictures are more than --sample.max_images 100,000"),
        (["--sample.per_class", "60000"], "180,000 pictures are more than --sample.max_images"),
        (["--num_inference_steps", "-3"], "--num_inference_steps: input should be greater"),
        (["--guidance_scale", "-1"], "--guidance_scale: input should be greater"),
        (["--sample.counts", "{X: 2}"], "unknown class X: this model draws I, P, R"),
        (["--sample.counts", "{I: -2}"], "--sample.counts.I"),
        (["--device", "cpu,quantum"], "--device quantum: unknown"),
        (["--device", "cuda:63"], "--device cuda:63: torch finds"),
        ([], "copies of training photographs cannot be told without them"),
    ],
)
def test_what_cannot_be_drawn_is_told(tmp_path: Path, flags: list[str], said: str) -> None:
    opened = OPEN if flags else []
    with pytest.raises(UserError) as caught:
        sample(config(tmp_path / "new", *opened, *flags))
    assert said in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def trained(photographs: Path, registry_store: Path) -> Iterator[tuple[RunConfig, RegisteredSampler]]:
    """A version of the embedded base itself, whose run tells where its photographs are."""
    own = contest_config(registry_store, photographs, "tiny_sdxl")
    own = validate(RunConfig, merge(own.model_dump(mode="json"), {"registry": {"name": "tiny"}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(registry_store)
        yield own, register(registry_store / "tiny", own, undamaged(), material_of(own))


def filtered(folder: Path, version: RegisteredSampler, *flags: str) -> SampleConfig:
    batches = ["--sample.batch_size", "3", "--sample.per_class", "4", "--num_inference_steps", "2"]
    return config(folder, "--model", version.uri, *batches, *DOUBTFUL, *flags)


@pytest.fixture(scope="module")
def unbroken(
    trained: tuple[RunConfig, RegisteredSampler], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What one undisturbed run leaves behind."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert sample(filtered(folder, trained[1])).complete
    return content(folder)


def test_dropped_pictures_are_replaced_and_counted(
    trained: tuple[RunConfig, RegisteredSampler], unbroken: dict[str, bytes]
) -> None:
    kept = list(csv.DictReader(unbroken["manifest.csv"].decode().splitlines()))
    dropped = list(csv.DictReader(unbroken["rejected.csv"].decode().splitlines()))
    assert [row["class"] for row in kept] == ["I"] * 4 + ["P"] * 4 + ["R"] * 4
    assert dropped
    assert {row["reason"] for row in dropped} <= {"copy", "colour"}
    assert not {row["seed"] for row in dropped} & {row["seed"] for row in kept}
    assert all(-1 <= float(row["nearest_similarity"]) <= 1 for row in kept)
    assert {path for path in unbroken if path.endswith(".png")} == {row["path"] for row in kept}


@pytest.mark.parametrize("devices", ["cpu,cpu", "cpu, cpu,cpu"])
def test_files_do_not_depend_on_the_devices(
    trained: tuple[RunConfig, RegisteredSampler], unbroken: dict[str, bytes], tmp_path: Path, devices: str
) -> None:
    assert sample(filtered(tmp_path, trained[1], "--device", devices, "--sample.batch_size", "3")).complete
    assert content(tmp_path) == unbroken


@pytest.mark.usefixtures("registered")
def test_a_folder_of_photographs_is_not_drawn_into(tmp_path: Path) -> None:
    photograph = tmp_path / "I" / "280_P003011BDLW.png"
    photograph.parent.mkdir()
    photograph.touch()
    with pytest.raises(UserError, match="holds other files: give an empty folder"):
        sample(config(tmp_path, *OPEN))
    with pytest.raises(UserError, match="is no folder"):
        sample(config(photograph, *OPEN))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [photograph]
    empty = tmp_path / "empty"
    (empty / "lost+found").mkdir(parents=True)
    for left in (".DS_Store", ".sampling.json.partial"):
        (empty / left).touch()
    check_folder(empty, {})


@pytest.mark.usefixtures("registered")
def test_a_compiled_model_is_compiled_once_and_draws_the_same_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, compile_module = CompileCounter(), nn.Module.compile  # runs what was captured; left out is g++ alone
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend=graphs))
    flags = (*OPEN, "--sample.batch_size", "3", "--sample.filter_colour", "false", "--sample.per_class", "5")
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        assert sample(config(tmp_path / name, *flags, "--sample.compile", compiled)).complete
    assert graphs.frame_count == 1
    for row in rows_of(tmp_path / "plain"):
        plain, compiled_picture = (
            np.asarray(Image.open(tmp_path / name / row["path"])).astype(int) for name in ("plain", "compiled")
        )
        assert np.abs(plain - compiled_picture).max() <= 1
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"--sample\.compile needs a C\+\+ compiler"):
        sample(config(tmp_path / "none", "--sample.compile", "true"))


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


@pytest.mark.parametrize(("survived", "torn"), [(0, False), (1, False), (1, True), (3, True)])
def test_a_run_that_was_cut_short_ends_like_an_unbroken_one(
    trained: tuple[RunConfig, RegisteredSampler],
    unbroken: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    survived: int,
    torn: bool,
) -> None:
    """Cut before a batch is written, or between its pictures and its last line."""
    writes, write = [0], sample_folder.SampleFolder.write

    def stop(self: sample_folder.SampleFolder, *args: object) -> None:
        if writes[0] == survived:
            if torn:
                write(self, *args)  # type: ignore[arg-type]
                manifest = self.folder / "manifest.csv"
                manifest.write_bytes(manifest.read_bytes()[:-9])
            raise Killed
        writes[0] += 1
        write(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(sample_folder.SampleFolder, "write", stop)
        with pytest.raises(Killed):
            sample(filtered(tmp_path, trained[1]))
    done = sample(filtered(tmp_path, trained[1]))
    assert done.complete
    assert content(tmp_path) == unbroken


@pytest.mark.slow
def test_the_same_command_goes_on_after_a_kill(
    trained: tuple[RunConfig, RegisteredSampler], unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    flags = ["--model", trained[1].uri, "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    flags += ["--sample.batch_size", "3", "--sample.per_class", "4", "--num_inference_steps", "2", *DOUBTFUL]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=mlflow.get_tracking_uri())
    command = [sys.executable, "-m", "entrypoints.sample", *flags]
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 200
    while not (tmp_path / "out" / "manifest.csv").exists():
        assert first.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == unbroken


def test_what_cannot_be_filled_is_said(trained: tuple[RunConfig, RegisteredSampler], tmp_path: Path) -> None:
    done = sample(filtered(tmp_path, trained[1], "--sample.max_draws_ratio", "1"))
    assert not done.complete
    assert "too many were dropped" in done.sentences[-1]
    assert len(rows_of(tmp_path)) + len(rows_of(tmp_path, "rejected.csv")) == 12


def test_copies_and_false_colours_are_told_from_new_pictures(trained: tuple[RunConfig, RegisteredSampler]) -> None:
    own = trained[0]
    photographs, split = Photographs(own, None), read_source(own).split
    checks = PictureChecks(photographs, ("copy", "colour"))
    training = evaluation_pixels(split.train[:8], own.data).numpy()
    assert [verdict.rejected for verdict in checks(training)] == ["copy"] * 8
    assert [verdict.rejected for verdict in checks(training[:, :, ::-1].copy())] == ["copy"] * 8, "mirrored"
    others = evaluation_pixels(split.held_out, own.data).numpy()
    new = checks(others)
    assert sum(verdict.rejected == "" for verdict in new) >= 0.9 * len(new)
    assert max(verdict.similarity or 0.0 for verdict in new) < 1
    grey = np.full((1, 64, 64, 3), 128, np.uint8)
    assert "of one colour" in checks(grey)[0].reason
    neon = np.where(others[:2] > 127, 255, 0).astype(np.uint8)
    assert {verdict.rejected for verdict in checks(neon)} == {"colour"}
    assert [each.rejected for each in PictureChecks(photographs, ())(grey)] == [""]


def test_other_photographs_than_the_versions_own_are_refused(trained: tuple[RunConfig, RegisteredSampler]) -> None:
    with pytest.raises(UserError, match="not those, or not the split"):
        Photographs(trained[0], "0" * 36)


@pytest.mark.usefixtures("registered")
def test_a_pickle_is_not_opened(
    trained: tuple[RunConfig, RegisteredSampler], registry_store: Path, tmp_path: Path
) -> None:
    version = register(registry_store / "pickled", trained[0], undamaged(), material_of(trained[0]))
    torch.save({"conv_in.weight": torch.zeros(1)}, locate(version.uri).folder / "weights.safetensors")
    with pytest.raises(UserError, match="does not hold this model's weights"):
        sample(config(tmp_path / "new", "--model", version.uri))
