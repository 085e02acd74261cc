"""Which extractors and metrics run: by configuration after an epoch, all of them for an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dfu_mlflow.config import RunConfig
from dfu_mlflow.panels import build_panels
from dfu_mlflow.preparation import Material, prepare, read_source


@pytest.fixture(scope="module")
def module_config(small_config_at: Callable[[Path], RunConfig], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_config_at(tmp_path_factory.mktemp("panels"))


@pytest.fixture(scope="module")
def material(module_config: RunConfig) -> Material:
    return prepare(module_config, read_source(module_config))


def with_metrics(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"metrics": config.metrics.model_copy(update=changes)})


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("dfu_mlflow.metrics.extractors.inception.CLEANFID_FOLDER", tmp_path)


def test_an_epoch_takes_what_is_configured(module_config: RunConfig, material: Material) -> None:
    found = build_panels(module_config, material)
    assert [panel.extractor.name for panel in found.panels] == ["efficientnet_lite0", "colour", "pixels"]
    assert "--metrics.inception_weights" in found.notes["fid"]
    assert "--metrics.lpips_weights" in found.notes["lpips_diversity"]
    assert "cmmd" not in found.notes
    assert len({panel.reference.size for panel in found.panels}) == 1
    alone = build_panels(with_metrics(module_config, per_epoch=("colour",)), material)
    assert [panel.extractor.name for panel in alone.panels] == ["colour"]
    assert alone.notes == {}


def test_an_evaluation_takes_everything(module_config: RunConfig, material: Material) -> None:
    found = build_panels(with_metrics(module_config, per_epoch=("efficientnet_lite0",)), material, thorough=True)
    assert [panel.extractor.name for panel in found.panels] == ["efficientnet_lite0", "colour", "pixels"]
    assert found.panels[0].reference.settings.metrics == ("frechet", "kernel", "neighbours", "vendi")
    assert {"fid", "kid_inception", "fd_dinov2", "coverage_dinov2", "cmmd", "lpips_nearest_real"} <= found.notes.keys()
