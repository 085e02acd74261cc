"""`evaluate`: any source, the figures that training saw, links in MLflow, and a report."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from mlflow import MlflowClient
from PIL import Image

from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import dump_yaml, merge, read_tree, validate
from dfu_mlflow.errors import UserError
from dfu_mlflow.participant import TrainingResult
from dfu_mlflow.pipeline import run_training
from registry.evaluate import EvaluateOptions, configuration, evaluate
from registry.publish import publish
from registry.source import locate
from tests.stores import new_store

Trained = tuple[RunConfig, TrainingResult]


@pytest.fixture(scope="module")
def trained(
    small_config_at: Callable[[Path], RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    """A registered LoRA run of a few steps; the working directory is its folder until the module ends."""
    folder = tmp_path_factory.mktemp("trained")
    change = {
        "adapter": {"method": "lora"},
        "train": {"epochs": 1, "learning_rate": 3e-2, "warmup_steps": 0, "mixed_precision": "bf16"},
        "evaluation": {"samples": 36},
        "data": {"validation_fraction": 0.4},
        "memorisation": {"neighbours": 20},
    }
    config = validate(RunConfig, merge(small_config_at(folder).model_dump(mode="json"), change))
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one precision a process
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mlflow.set_tracking_uri(new_store(folder))
        yield config, run_training(config, publish=lambda result: publish(result, config))
        mlflow.set_tracking_uri(None)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_registered_version_has_the_figures_that_training_saw(trained: Trained) -> None:
    config, trained_result = trained
    result = evaluate(EvaluateOptions(source=f"models:/{config.registry.name}@challenger"), None, [])
    group = "eval" if trained_result.shown == "live" else "eval_ema"
    for name in ("fd", "kid", "fd_low", "kid_high", "fd_floor", "class_accuracy"):
        assert result.figures[f"eval/{name}"] == pytest.approx(trained_result.figures[f"{group}/{name}"], rel=1e-6), (
            name
        )
    assert {"eval/vendi", "eval/coverage", "eval/saturation", "val/loss"} <= result.figures.keys()
    assert {"memorisation/membership_auc", "memorisation/pixels/copy_excess"} <= result.figures.keys()

    client = MlflowClient()
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["evaluated.run_id"] == trained_result.run_id
    assert [point.step for point in client.get_metric_history(result.run_id, "eval/kid")] == [0, 1]
    model = client.get_logged_model(run.data.tags["evaluated.model_id"])
    linked = {metric.key: metric for metric in model.metrics}
    assert linked["eval/kid"].value == result.figures["eval/kid"]
    assert linked["eval/kid"].dataset_name == "photographs-evaluation"
    html = Path(client.download_artifacts(result.run_id, "report.html")).read_text(encoding="utf-8")
    assert html == result.report.read_text(encoding="utf-8")
    assert "<td>fid</td>" in html


def test_fewer_pictures_than_a_distance_needs_are_refused(trained: Trained, tmp_path: Path) -> None:
    source = photographs_as_source(trained[0], tmp_path / "pictures", lambda pixels: pixels)
    for label in ("I", "P", "R"):
        for path in sorted((source / label).iterdir())[2:]:
            path.unlink()
    with pytest.raises(UserError, match="6 pictures of --source are fewer than the 10"):
        evaluate(EvaluateOptions(source=str(source)), config_file(trained[0], tmp_path), [])


def size_px(picture: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(picture)) as opened:
        return opened.size


def test_closest_pairs_stay_on_the_disk_and_private(trained: Trained) -> None:
    result = evaluate(EvaluateOptions(source=str(trained[1].folder)), None, ["--memorisation.pairs", "3"])
    pairs = result.report.parent / "closest_pairs"
    assert sorted(path.name for path in pairs.iterdir()) == [
        "pair_001.png",
        "pair_002.png",
        "pair_003.png",
        "pairs.csv",
    ]
    assert {path.stat().st_mode & 0o777 for path in pairs.iterdir()} == {0o600}
    logged = [file.path for file in MlflowClient().list_artifacts(result.run_id)]
    assert sorted(logged) == ["config.yaml", "images", "report.html"]
    codes = re.findall(r'src="data:image/\w+;base64,([^"]+)"', result.report.read_text(encoding="utf-8"))
    shown = [size_px(base64.b64decode(code)) for code in codes]
    assert shown
    assert size_px((pairs / "pair_001.png").read_bytes()) not in shown


def test_too_few_photographs_for_a_question_are_said_not_asked(trained: Trained) -> None:
    result = evaluate(EvaluateOptions(source=str(trained[1].folder)), None, ["--memorisation.neighbours", "500"])
    assert not any(name.startswith("memorisation/") for name in result.figures)
    said = MlflowClient().get_run(result.run_id).data.tags["not_computed.memorisation"]
    assert said == "42 training photographs are fewer than --memorisation.neighbours 500"


def test_utility_is_measured_when_asked_for(trained: Trained) -> None:
    flags = ["--utility.enabled", "true", "--utility.steps", "4", "--utility.seeds", "2"]
    result = evaluate(EvaluateOptions(source=str(trained[1].folder)), None, flags)
    assert {"utility/tuned_gain/kappa_low", "utility/only_tuned/macro_f1", "utility/with_base/accuracy"} <= (
        result.figures.keys()
    )
    html = result.report.read_text(encoding="utf-8")
    assert "<h2>Utility</h2>" in html
    assert "<h2>Memorisation</h2>" in html


def test_another_split_than_the_models_own_is_said_first(trained: Trained) -> None:
    own, other = (
        evaluate(EvaluateOptions(source=trained[1].run_id), None, [*flags, "--memorisation.enabled", "false"])
        for flags in ([], ["--seed", "7"])
    )
    assert not any("not the photographs and the split" in sentence for sentence in own.sentences)
    assert "not the photographs and the split" in other.sentences[0]


@pytest.mark.parametrize(
    ("options", "flags", "said"),
    [
        ({"weights": "live"}, [], "holds one set of weights"),
        ({}, ["--prompts.style", "detailed"], "draws from its own prompts"),
    ],
)
def test_what_cannot_change_a_packaged_sampler_is_refused(
    trained: Trained, options: dict[str, str], flags: list[str], said: str
) -> None:
    chosen = EvaluateOptions.model_validate({"source": "models:/dfu-sampler@challenger", **options})
    with pytest.raises(UserError, match=said):
        evaluate(chosen, None, flags)


def test_a_bundle_does_not_stand_for_photographs(trained: Trained) -> None:
    assert trained[1].bundle is not None
    with pytest.raises(UserError, match="does not tell which photographs"):
        evaluate(EvaluateOptions(source=str(trained[1].bundle)), None, [])


def test_stated_settings_lie_over_the_sources_own(trained: Trained, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("sampling: {guidance_scale: 9}\n")
    located = locate(trained[1].run_id)
    config = configuration(located, read_tree(str(mine)))
    assert config.adapter == trained[0].adapter
    assert config.data == trained[0].data
    assert (config.sampling.guidance_scale, str(config.output_dir)) == (9.0, "outputs/evaluate")


def test_run_model_and_folder_are_the_same_source(trained: Trained) -> None:
    config, result = trained
    registered = locate(f"models:/{config.registry.name}/1")
    assert locate(result.run_id).model_id == locate(f"models:/{registered.model_id}").model_id == registered.model_id
    assert registered.version == f"{config.registry.name}/1"
    for found in (registered, locate(str(result.folder))):
        assert found.configuration is not None
        assert validate(RunConfig, found.configuration) == config


def test_guidance_that_is_typed_is_used(trained: Trained) -> None:
    options = EvaluateOptions(source=str(trained[1].folder))
    own = evaluate(options, None, [])
    other = evaluate(options, None, ["--sampling.guidance_scale", "9"])
    assert own.figures["eval/kid"] != other.figures["eval/kid"]
    assert own.figures["val/loss"] == other.figures["val/loss"]


def photographs_as_source(config: RunConfig, folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    for path in Path(str(config.data.root)).glob("*/*.png"):
        target = folder / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(change(np.asarray(Image.open(path).convert("RGB")))).save(target)
    return folder


def config_file(config: RunConfig, folder: Path) -> str:
    path = folder / "config.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    return str(path)


def test_a_folder_of_photographs_is_near_the_floor(trained: Trained, tmp_path: Path) -> None:
    source = photographs_as_source(trained[0], tmp_path / "pictures", lambda pixels: pixels)
    result = evaluate(EvaluateOptions(source=str(source)), config_file(trained[0], tmp_path), [])
    assert result.figures["eval/kid"] < result.figures["eval/kid_floor_high"]
    assert result.figures["eval/coverage"] > 0.9
    assert "val/loss" not in result.figures
    assert result.sentences == ()


def test_a_small_folder_is_compared_at_its_own_size(trained: Trained, tmp_path: Path) -> None:
    source = photographs_as_source(trained[0], tmp_path / "pictures", lambda pixels: pixels)
    for label in ("I", "P", "R"):
        for path in sorted((source / label).iterdir())[6:]:
            path.unlink()
    result = evaluate(EvaluateOptions(source=str(source)), config_file(trained[0], tmp_path), [])
    assert "eval/kid" in result.figures
    logged = [file.path for file in MlflowClient().list_artifacts(result.run_id, "images")]
    steps = {re.findall(r"step[+]([01])", path.replace("%2B", "+"))[0] for path in logged}
    assert steps == {"0"}, "the base's pictures alone: a folder may hold photographs"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pixels: 255 - pixels, "look inverted"),
        (lambda pixels: (pixels.astype(np.int32) * 2 % 256).astype(np.uint8), "wrapped"),
        (lambda pixels: (pixels > 127).astype(np.uint8), "was not scaled"),
    ],
)
def test_pictures_in_another_value_range_are_refused(
    trained: Trained, tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], said: str
) -> None:
    source = photographs_as_source(trained[0], tmp_path / "pictures", change)
    with pytest.raises(UserError, match=said):
        evaluate(EvaluateOptions(source=str(source)), config_file(trained[0], tmp_path), [])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("models:/dfu-sampler@nobody", "cannot be had"),
        ("models:/dfu-sampler/77", "cannot be had"),
        ("f" * 32, "cannot be had"),
        ("nowhere", "is no folder: give a checkpoint"),
    ],
)
def test_sources_that_do_not_exist_are_named(trained: Trained, source: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        evaluate(EvaluateOptions(source=source), None, ["--data.root", str(trained[0].data.root)])
