"""MLproject, conda.yaml, pyproject.toml, entry points and imports tell one story."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow.projects.utils import load_project

from dfu_mlflow.config import RunConfig, load
from dfu_mlflow.errors import UserError
from tests.stores import new_store

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("dfu_mlflow", "entrypoints", "registry", "tuning")
PROJECT = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ENTRY_POINTS = sorted(PROJECT["entry_points"])
PARAMETERS = [(entry, name) for entry in ENTRY_POINTS for name in PROJECT["entry_points"][entry].get("parameters", {})]
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "skimage": "scikit-image"} | {
    "cleanfid": "clean-fid",
    "pynvml": "nvidia-ml-py",
}
"""Where a package is imported by another name than it is installed by."""
OPTIONAL = {"bitsandbytes"}
"""Used where installed; a CUDA build only."""


def environment() -> tuple[list[str], list[str]]:
    """conda.yaml's own entries and its pip lines."""
    entries = yaml.safe_load((ROOT / "conda.yaml").read_text(encoding="utf-8"))["dependencies"]
    (pip,) = (entry["pip"] for entry in entries if isinstance(entry, dict))
    return [entry for entry in entries if isinstance(entry, str)], pip


def imported_packages() -> set[str]:
    names: set[str] = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - set(PACKAGES)


def test_environment_pins_every_dependency_once() -> None:
    conda, pip = environment()
    assert conda == ["python=3.11", "pip"], "`mlflow run --env-manager uv` drops everything else that conda lists"
    assert [line for line in pip if not re.fullmatch(r"[a-z0-9-]+==[\w.]+", line)] == []
    names = [line.split("==")[0] for line in pip]
    assert len(names) == len(set(names))


def test_dependencies_stand_in_one_place() -> None:
    assert "dependencies" not in SETTINGS["project"]
    assert "optional-dependencies" not in SETTINGS["project"]
    assert SETTINGS["tool"]["uv"] == {"package": False}
    assert not (ROOT / "uv.lock").exists(), "a lock file beside MLproject replaces conda.yaml without a word"
    assert not list(ROOT.glob("requirements*.txt"))


def test_names_and_versions_of_python_agree() -> None:
    assert PROJECT["conda_env"] == "conda.yaml"
    names = {PROJECT["name"], SETTINGS["project"]["name"]}
    names.add(yaml.safe_load((ROOT / "conda.yaml").read_text(encoding="utf-8"))["name"])
    assert names == {"dfu-mlflow"}
    assert SETTINGS["project"]["requires-python"] == ">=3.11,<3.12"
    assert SETTINGS["tool"]["mypy"]["python_version"] == "3.11"
    assert SETTINGS["tool"]["ruff"]["target-version"] == "py311"


def test_everything_imported_is_a_direct_dependency() -> None:
    pinned = {line.split("==")[0] for line in environment()[1]}
    needed = {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in imported_packages()}
    assert needed - pinned - OPTIONAL == set()


def test_installed_versions_are_the_pinned_ones() -> None:
    from importlib import metadata

    wrong = {line: metadata.version(line.split("==")[0]) for line in environment()[1]}
    assert {line: version for line, version in wrong.items() if not line.endswith(f"=={version}")} == {}


def ci_on_a_machine_with(folder: Path, programs: dict[str, str]) -> tuple[int, list[str]]:
    """Exit code of .ci/run, and what it called, where nothing else than these shell programs is installed."""
    places, called = folder / "bin", folder / "called"
    places.mkdir()
    for name in ("bash", "dirname", "env", "timeout"):
        (places / name).symlink_to(str(shutil.which(name)))
    for name, ending in programs.items():
        (places / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {called}\n{ending}\n', encoding="utf-8")
        (places / name).chmod(0o755)
    done = subprocess.run([ROOT / ".ci" / "run"], env={"PATH": str(places)}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
    return done.returncode, called.read_text(encoding="utf-8").splitlines()


TESTED = ["pip install mlflow==3.17.2 uv", "mlflow run . -e test --env-manager uv"]


def test_ci_runs_the_readmes_test_command_and_nothing_else(tmp_path: Path) -> None:
    command = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    assert command == 'pip install "mlflow==3.17.2" uv && mlflow run . -e test --env-manager uv'
    assert "mlflow==3.17.2" in environment()[1]
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert ci_on_a_machine_with(tmp_path, {"pip": "", "mlflow": "exit 3"}) == (3, TESTED)


@pytest.mark.parametrize("ending", ["exit 0", "exit 100"])
def test_ci_gets_chromium_where_it_can_and_goes_on_where_it_cannot(ending: str, tmp_path: Path) -> None:
    programs = {"pip": "", "mlflow": "", "apt-get": ending, "sudo": 'shift; exec "$@"'}
    code, called = ci_on_a_machine_with(tmp_path, programs)
    wanted = ["apt-get -qq update", "apt-get -qq install -y --no-install-recommends chromium"]
    assert [line for line in called if line.startswith("apt-get")] == wanted[: 2 if ending == "exit 0" else 1]
    assert (code, called[-2:]) == (0, TESTED)


def test_ci_leaves_a_machine_with_chromium_as_it_is(tmp_path: Path) -> None:
    programs = dict.fromkeys(("pip", "mlflow", "apt-get", "sudo", "chromium"), "")
    assert ci_on_a_machine_with(tmp_path, programs) == (0, TESTED)


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_entry_point_is_a_module(entry: str) -> None:
    assert PROJECT["entry_points"][entry]["command"].split()[:3] == ["python", "-m", f"entrypoints.{entry}"]
    source = (ROOT / "entrypoints" / f"{entry}.py").read_text(encoding="utf-8")
    assert f"mlflow run . -e {entry}" in source
    assert "entry.run(main" in source


def test_every_entry_point_is_in_mlproject() -> None:
    modules = {path.stem for path in (ROOT / "entrypoints").glob("*.py")} - {"__init__"}
    assert modules == set(ENTRY_POINTS)


@pytest.fixture
def own_store(tmp_path: Path) -> Iterator[None]:
    """Two processes that make the default store in one folder at once get in each other's way."""
    mlflow.set_tracking_uri(new_store(tmp_path))
    yield
    mlflow.set_tracking_uri(None)


@pytest.mark.usefixtures("own_store")
@pytest.mark.parametrize(("entry", "name"), PARAMETERS)
def test_declared_parameter_reaches_the_parser(entry: str, name: str) -> None:
    command = load_project(str(ROOT)).get_entry_point(entry).compute_command({name: "no such thing"}, None)
    arguments = shlex.split(command)[3:]
    assert arguments[arguments.index(f"--{name}") + 1] == "no such thing"
    with pytest.raises(UserError, match="no such thing"):
        importlib.import_module(f"entrypoints.{entry}").main(arguments)


@pytest.mark.parametrize(
    ("given", "path", "value"),
    [
        ({"train.learning_rate": "1e-5"}, "train.learning_rate", 1e-5),
        ({"data.root": "a folder/with 'quotes' & $signs"}, "data.root", "a folder/with 'quotes' & $signs"),
        ({"data.group_by": r"^\d+_P(\d{3})"}, "data.group_by", r"^\d+_P(\d{3})"),
        ({"prompts.phase_prompts": '{"I": "a, b"}'}, "prompts.phase_prompts", {"I": "a, b"}),
        ({"prompts.negative_prompt": ""}, "prompts.negative_prompt", ""),
        ({"loss.perceptual_loss.enabled": "true"}, "loss.perceptual_loss.enabled", True),
        ({"data.manifest": "null"}, "data.manifest", None),
    ],
)
def test_undeclared_parameters_arrive_as_flags(given: dict[str, str], path: str, value: object) -> None:
    """`-P section.field=value`, quoted by MLflow, taken apart by the shell, read by the schema."""
    command = load_project(str(ROOT)).get_entry_point("train").compute_command(given, None)
    arguments = shlex.split(command)[3:]
    assert arguments[:2] == ["--config", "tiny"]
    found: Any = load(RunConfig, "tiny", arguments[2:])
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


def test_bad_flag_of_the_test_entry_point_is_told() -> None:
    with pytest.raises(UserError, match="--fats: unknown"):
        importlib.import_module("entrypoints.test").main(["--fats", "true"])


def test_licence_is_what_the_project_says() -> None:
    assert SETTINGS["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:200]
