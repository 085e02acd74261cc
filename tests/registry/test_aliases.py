"""The champion's alias: killed between writes, raced for, and rolled back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from dfu_mlflow.errors import UserError
from registry.aliases import Overtaken, crown, registry_lock, roll_back, version_at
from registry.package import ROOT

CHILD = Path(__file__).with_name("alias_writes_child.py")


def run_child(folder: Path, what: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(CHILD), f"sqlite:///{folder / 'mlflow.db'}", what],
        cwd=folder,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


@pytest.mark.slow
def test_a_kill_between_any_two_writes_leaves_the_old_champion_served(tmp_path: Path) -> None:
    """Writes of a promotion: two tags, what it replaced, `previous`, `champion`. Of a rollback: tag, two aliases."""
    rows = run_child(tmp_path, "kill")
    assert [row["killed"] for row in rows] == [True] * 5 + [False] * 2
    assert [row["after"][0] for row in rows] == [2] * 5 + [3] * 2, "the old champion until the last write"
    assert all(row["again"] == [3, 2] for row in rows), "the same promotion goes through afterwards"
    assert [row["back_killed"] for row in rows] == [True] * 3 + [False] * 4
    assert [row["back_after"] for row in rows] == [[3, 2], [3, 2], [2, 2]] + [[2, 1]] * 4


@pytest.mark.slow
def test_of_two_at_once_one_wins_and_the_other_knows(tmp_path: Path) -> None:
    for row in run_child(tmp_path, "race"):
        winner = row["after"][0]
        assert sorted(row["codes"]) == sorted([winner, 7])
        assert row["after"][1] == 1


@pytest.fixture
def three_versions(registry_store: Path, request: pytest.FixtureRequest) -> str:
    name, client = f"versions-{request.node.name}", MlflowClient()
    client.create_registered_model(name)
    for _ in range(3):
        client.create_model_version(name, source=str(registry_store))
    return name


def test_rolling_back_goes_one_champion_further_each_time(three_versions: str) -> None:
    name = three_versions
    for version, expected in ((1, None), (2, 1), (3, 2)):
        crown(name, version, expected, {})
    assert (version_at(name, "champion"), version_at(name, "previous")) == (3, 2)
    assert roll_back(name) == (3, 2)
    assert (version_at(name, "champion"), version_at(name, "previous")) == (2, 1)
    assert MlflowClient().get_model_version(name, "3").tags["gate.status"] == "rolled back"
    assert roll_back(name) == (2, 1)
    assert version_at(name, "previous") is None
    with pytest.raises(UserError, match="version 1 is the first champion"):
        roll_back(name)


def test_what_was_judged_against_another_champion_does_not_win(three_versions: str) -> None:
    crown(three_versions, 1, None, {})
    with pytest.raises(Overtaken, match="is version 1, it was version None"):
        crown(three_versions, 2, None, {"gate.status": "promoted"})
    assert version_at(three_versions, "champion") == 1
    assert MlflowClient().get_model_version(three_versions, "2").tags == {}


def test_without_a_champion_there_is_nothing_to_roll_back(three_versions: str) -> None:
    with pytest.raises(UserError, match="has no champion"):
        roll_back(three_versions)


def test_the_lock_lies_beside_the_database(registry_store: Path) -> None:
    with registry_lock("dfu-sampler"):
        assert [path.name for path in registry_store.glob("mlflow.db.*.lock")]
