"""The tracker against a real store: what it writes, how a run ends, what resuming repeats."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dfu_mlflow.config import RunConfig, flatten
from dfu_mlflow.errors import Interrupted, UserError
from dfu_mlflow.tracking import masked, track
from dfu_mlflow.tracking_store import check_store, logged_images
from dfu_mlflow.training_run import TrainingRun

pytestmark = pytest.mark.usefixtures("store")

CONFIG = RunConfig.model_validate({"tracking": {"system_metrics": False}})


def points(run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient().get_metric_history(run_id, key)]


def log_then_raise(error: BaseException) -> None:
    with track(CONFIG) as tracker:
        tracker.step(1, {"step/loss": 1.0})
        raise error


def test_resolved_configuration_and_derived_figures_are_params() -> None:
    with track(CONFIG) as tracker:
        tracker.params(CONFIG, {"prompt_length": 9, "method": "full", "perceptual_weight": 0.0})
    run = mlflow.get_run(tracker.run_id)
    assert {key for key in run.data.params if key.startswith("cfg/")} == {f"cfg/{key}" for key in flatten(CONFIG)}
    assert run.data.params["cfg/train.learning_rate"] == str(CONFIG.train.learning_rate)
    assert run.data.params["prompt_length"] == "9"
    assert run.data.params["method"] == "full"
    assert mlflow.get_experiment(run.info.experiment_id).name == CONFIG.tracking.experiment


def test_params_that_mlflow_run_logged_as_typed_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient()
    run_id = client.create_run("0").info.run_id
    client.log_param(run_id, "base_model", "'some folder'")
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with track(CONFIG) as tracker:
        assert tracker.run_id == run_id
        tracker.params(CONFIG, {"base_model": "some folder", "seed": 0})
    params = client.get_run(run_id).data.params
    assert params["base_model"] == "'some folder'"
    assert params["seed"] == "0"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Interrupted("SIGTERM"), "KILLED", "interrupted: SIGTERM"),
        (KeyboardInterrupt(), "KILLED", "interrupted"),
        (UserError("no images in /data"), "FAILED", "user error: no images in /data"),
        (
            ValueError("loss is nan in 280_P003011BDLW.png[1,2,3,4]"),
            "FAILED",
            "ValueError: loss is nan in [image][1,2,3,4]",
        ),
        (
            ValueError("cannot read /data/I/Muster Maria 1950.JFIF: truncated"),
            "FAILED",
            "ValueError: cannot read /data/I/[image]: truncated",
        ),
        (SystemExit(3), "FAILED", "SystemExit: 3"),
        (SystemExit(0), "FINISHED", "finished"),
    ],
)
def test_how_a_block_ends_is_how_its_run_ends(error: BaseException, status: str, reason: str) -> None:
    with pytest.raises(type(error)):
        log_then_raise(error)
    run = mlflow.last_active_run()
    assert run.info.status == status
    assert run.data.tags["exit.reason"] == reason
    assert points(run.info.run_id, "step/loss") == [(1, 1.0)], "what waited in the buffer is stored all the same"
    assert mlflow.active_run() is None


def test_flush_stores_every_point_that_came_before() -> None:
    with track(CONFIG) as tracker:
        for step in range(1, 401):
            tracker.step(step, {"step/loss": 1 / step, "step/lr": 1e-4, "step/grad_norm": 1.0})
        assert points(tracker.run_id, "step/loss") != [(step, 1 / step) for step in range(1, 401)]
        tracker.flush()
        assert points(tracker.run_id, "step/loss") == [(step, 1 / step) for step in range(1, 401)]


def test_a_store_that_is_away_costs_no_checkpoint_and_no_points(monkeypatch: pytest.MonkeyPatch) -> None:
    with track(CONFIG) as tracker:
        run = object.__new__(TrainingRun)
        run.tracker = tracker
        tracker.step(1, {"step/loss": 1.0})
        with monkeypatch.context() as patch:

            def away(*_: object, **__: object) -> None:
                raise MlflowException("no route to host")

            patch.setattr(tracker._client, "log_batch", away)
            run.before_checkpoint()
        tracker.flush()
        assert points(tracker.run_id, "step/loss") == [(1, 1.0)]


def test_figures_that_are_not_finite_are_counted_not_stored() -> None:
    with track(CONFIG) as tracker:
        tracker.epoch(0, {"eval/kid": float("nan"), "eval/fd": float("inf"), "val/loss": 0.5})
        tracker.epoch(1, {"eval/kid": float("-inf"), "val/loss": 0.4})
    run = mlflow.get_run(tracker.run_id)
    assert run.data.metrics == {"val/loss": 0.4}
    assert run.data.tags["metrics.nonfinite_skipped"] == "3"


def test_class_labels_that_mlflow_refuses_still_show() -> None:
    with track(CONFIG) as tracker:
        tracker.epoch(0, {"eval/Grad II (tief)/kid": 1.0})
        tracker.image("samples/Grad II (tief)", 0, np.zeros((4, 4, 3), np.uint8))
    assert mlflow.get_run(tracker.run_id).data.metrics == {"eval/Grad II _tief_-176e/kid": 1.0}
    assert logged_images(MlflowClient(), tracker.run_id) == {"samples~Grad II _tief_-176e+step+0"}


def test_images_are_stored_as_given_and_floats_are_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    with track(CONFIG) as tracker:
        tracker.image("samples/I", 2, pixels)
        with pytest.raises(ValueError, match="uint8"):
            tracker.image("samples/I", 3, pixels / 255)
    folder = Path(mlflow.artifacts.download_artifacts(run_id=tracker.run_id, artifact_path="images"))
    stored = mlflow.Image(str(next(folder.glob("*.png")))).to_array()
    np.testing.assert_array_equal(stored, pixels)


def test_pictures_of_labels_that_mlflow_cannot_write_are_kept_apart() -> None:
    pixels = np.zeros((8, 6, 3), np.uint8)
    with track(CONFIG) as tracker:
        for number, label in enumerate(("炎症期", "増殖期", "成熟期", "I")):
            tracker.image(f"samples/{label}", 1, pixels + np.uint8(number))
    folder = Path(mlflow.artifacts.download_artifacts(run_id=tracker.run_id, artifact_path="images"))
    shown = {int(mlflow.Image(str(path)).to_array().max()) for path in folder.glob("*.png")}
    assert shown == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "text",
    [
        "/d/I/Mueller (2).jpg cannot be decoded",
        "lost: Mueller(1).JPG",
        "/d/I/Mueller, Hans.jpg cannot be decoded",
        "/d/I/O'Mueller Mary.jpeg, and others",
        UserError("class R has one patient (Mueller_Hans)", private=["Mueller_Hans"]),
        UserError("not finite on Mueller Hans 1.jpg, Mueller 2.jpg", private=["Mueller 2.jpg", "Mueller Hans 1.jpg"]),
    ],
)
def test_no_patient_is_named_in_what_leaves_the_machine(text: str | UserError) -> None:
    assert "Mueller" not in masked(text)
    assert "Hans" not in masked(text)


def test_a_database_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = mlflow.get_tracking_uri()
    try:
        mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/below/that/is/made/mlflow.db")
        check_store()
        mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/file/mlflow.db")
        with pytest.raises(UserError, match="cannot be written: set MLFLOW_TRACKING_URI"):
            check_store()
    finally:
        mlflow.set_tracking_uri(before)


def test_a_store_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("http://user:secret@127.0.0.1:9")
    try:
        with pytest.raises(UserError, match="does not answer") as caught:
            check_store()
    finally:
        mlflow.set_tracking_uri(before)
    assert "secret" not in str(caught.value)


def test_dataset_is_an_input_without_files() -> None:
    with track(CONFIG) as tracker:
        tracker.dataset("phantom", "d" * 64, "phantom", {"I": 3, "P": 4}, context="evaluation")
    (given,) = mlflow.get_run(tracker.run_id).inputs.dataset_inputs
    assert given.dataset.name == "phantom"
    assert given.dataset.digest == "d" * 36
    assert json.loads(given.dataset.profile) == {"I": 3, "P": 4}
    assert [tag.value for tag in given.tags] == ["evaluation"]


def test_checkpoint_is_a_logged_model_found_by_its_metric(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "unet.safetensors").write_bytes(b"weights")
    with track(CONFIG) as tracker:
        tracker.dataset("phantom", "e" * 64, "phantom", {"I": 3}, context="evaluation")
        tracker.epoch(1, {"eval/kid": 0.3})
        ids = [
            tracker.checkpoint(1, "live", {"eval/kid": 0.3}, folder),
            tracker.checkpoint(2, "live", {"eval/kid": 0.1}),
        ]
        assert tracker.checkpoint(2, "live", {"eval/kid": 0.1}) == ids[1], "a checkpoint is logged once"
    assert points(tracker.run_id, "eval/kid") == [(1, 0.3), (2, 0.1)], "the model's metrics double no point"
    client = MlflowClient()
    found = client.search_logged_models(
        [tracker.experiment_id],
        datasets=[{"dataset_name": "phantom", "dataset_digest": "e" * 36}],
        order_by=[{"field_name": "metrics.eval/kid", "ascending": True}],
    )
    assert [model.model_id for model in found] == ids[::-1]
    assert [model.status for model in found] == ["READY", "READY"]
    artifacts = Path(mlflow.artifacts.download_artifacts(f"models:/{ids[0]}"))
    assert (artifacts / "unet.safetensors").read_bytes() == b"weights"
    assert {output.model_id for output in mlflow.get_run(tracker.run_id).outputs.model_outputs} == set(ids)


def test_resume_goes_on_in_the_same_run_without_doubled_points() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    with track(CONFIG) as tracker:
        tracker.params(CONFIG, {"seed": 0})
        for step in (1, 2, 3):
            tracker.step(step, {"step/loss": 1 / step})
        tracker.epoch(0, {"val/loss": 0.5})
        tracker.image("samples/I", 0, pixels)
        model_id = tracker.checkpoint(0, "live", {"val/loss": 0.5})
    longer = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"epochs": 7})})
    with track(longer, tracker.run_id) as resumed:
        assert mlflow.get_run(resumed.run_id).info.status == "RUNNING"
        resumed.params(longer, {"seed": 0})
        for step in (2, 3, 4):
            resumed.step(step, {"step/loss": 1 / step})
        resumed.epoch(0, {"val/loss": 0.5, "eval/kid": 0.1})
        resumed.image("samples/I", 0, pixels)
        assert resumed.checkpoint(0, "live", {"val/loss": 0.5}) == model_id
    run = mlflow.get_run(tracker.run_id)
    assert resumed.run_id == tracker.run_id
    assert run.info.status == "FINISHED"
    assert run.data.tags["exit.reason"] == "finished"
    assert json.loads(run.data.tags["cfg.changed_on_resume"]) == {"cfg/train.epochs": "7"}
    assert points(run.info.run_id, "step/loss") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)]
    assert points(run.info.run_id, "val/loss") == [(0, 0.5)]
    assert points(run.info.run_id, "eval/kid") == [(0, 0.1)]
    assert len(MlflowClient().list_artifacts(run.info.run_id, "images")) == 2, "a picture and its thumbnail"


def test_resume_under_mlflow_run_makes_its_run_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    with track(CONFIG) as tracker:
        tracker.epoch(0, {"val/loss": 0.5})
    client = MlflowClient()
    placeholder = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", placeholder)
    with track(CONFIG, tracker.run_id) as resumed:
        resumed.epoch(1, {"val/loss": 0.4})
    assert resumed.run_id == tracker.run_id
    child = client.get_run(placeholder)
    assert child.data.tags["mlflow.parentRunId"] == tracker.run_id
    assert child.data.tags["resumes"] == tracker.run_id
    assert child.info.run_name == f"resume of {client.get_run(tracker.run_id).info.run_name}"
    assert child.data.metrics == {}
    assert points(tracker.run_id, "val/loss") == [(0, 0.5), (1, 0.4)]


def test_resuming_a_run_of_another_store_starts_one_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    lost = "0" * 32
    with track(CONFIG, lost) as tracker:
        pass
    assert tracker.run_id != lost
    assert mlflow.get_run(tracker.run_id).data.tags["resumes"] == lost
    assert "MLFLOW_TRACKING_URI" in caplog.text


def test_experiment_of_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from the environment")
    with track(CONFIG) as tracker:
        pass
    assert mlflow.get_experiment(tracker.experiment_id).name == "from the environment"


def test_deleted_experiment_is_a_user_error() -> None:
    client = MlflowClient()
    client.delete_experiment(client.create_experiment(CONFIG.tracking.experiment))
    with pytest.raises(UserError, match=r"tracking\.experiment"), track(CONFIG):
        pass


def test_a_run_inside_a_run_is_its_child() -> None:
    with track(CONFIG) as outer, track(CONFIG) as inner:
        inner.epoch(0, {"val/loss": 1.0})
    assert mlflow.get_run(inner.run_id).data.tags["mlflow.parentRunId"] == outer.run_id
    assert points(outer.run_id, "val/loss") == []
