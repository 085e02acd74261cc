"""Imports point one way, sizes stay readable, and nothing is unpickled."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("dfu_mlflow", "entrypoints", "registry", "tuning")
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60

LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "alone",
        "config",
        "documents",
        "entry",
        "errors",
        "interrupt",
        "launch",
        "lean_imports",
        "phase_bars",
        "phases",
        "ranks",
        "runtime",
        "threading_policy",
        "types",
    ),
    ("base", "conditioning", "data", "denoising", "ema", "fused", "optimizers", "schedules"),
    (
        "activations",
        "base.pretraining",
        "bundle",
        "bundle_format",
        "checkpoint",
        "memory",
        "memory_figures",
        "metrics",
        "objective",
        "pass_timing",
        "perceptual",
        "report",
        "sampling",
        "validation",
    ),
    (
        "base_evaluation",
        "batches",
        "confirmation",
        "engine_choice",
        "engines",
        "evaluation_budget",
        "evaluator",
        "history",
        "memory_limits",
        "memory_phases",
        "panels",
        "photograph_features",
        "preparation",
        "progress",
        "quick_evaluation",
        "resume",
        "shards",
        "zero",
        "subject",
        "trainer",
        "verdict",
    ),
    ("tracking", "tracking_store"),
    (
        "contest",
        "diagnosis",
        "evaluation_run",
        "measured_run",
        "memorisation",
        "participant",
        "pipeline",
        "plan",
        "sightings",
        "training_run",
        "utility",
    ),
    ("registry", "tuning"),
    ("entrypoints",),
)
"""Lowest first. A module imports its own layer and those below; a new module takes its place here."""


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file; a package is its `__init__.py`."""
    found = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def imported_names(module: str) -> Iterator[str]:
    """Everything a module imports, anywhere in it: `from a import b` gives `a.b` where that is a module."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module


def layer(module: str) -> int:
    """Position in LAYERS, by the longest name that fits."""
    name = module.removeprefix("dfu_mlflow.")
    fits = [
        (len(known), rank) for rank, names in enumerate(LAYERS) for known in names if f"{name}.".startswith(f"{known}.")
    ]
    assert fits, f"{module} has no place in LAYERS"
    return max(fits)[1]


def own_imports(module: str) -> set[str]:
    return {name for name in imported_names(module) if name in modules() and name not in ("dfu_mlflow", module)}


@pytest.mark.parametrize("module", sorted(set(modules()) - {"dfu_mlflow"}))
def test_imports_point_down(module: str) -> None:
    upward = {name for name in own_imports(module) if layer(name) > layer(module)}
    assert upward == set()


def test_imports_have_no_cycle() -> None:
    # A package's __init__ re-exports its modules and they do not use it, so it may be imported beside them.
    order = list(graphlib.TopologicalSorter({module: own_imports(module) for module in modules()}).static_order())
    assert set(order) == set(modules())


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("optuna", ("tuning",)),
        ("mlflow", ("dfu_mlflow.tracking", "dfu_mlflow.tracking_store", "entrypoints", "registry", "tuning")),
        ("pickle", ()),
        ("cloudpickle", ()),
    ],
)
def test_library_stays_where_it_belongs(library: str, allowed: tuple[str, ...]) -> None:
    users = {module for module in modules() if library in {name.split(".")[0] for name in imported_names(module)}}
    assert {user for user in users if not any(f"{user}.".startswith(f"{place}.") for place in allowed)} == set()


def test_nothing_is_unpickled() -> None:
    for module in modules():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True", f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_file_fits_its_reader(module: str) -> None:
    assert modules()[module].stem not in ("utils", "util", "helpers", "common", "misc")
    lines = modules()[module].read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE_LINES
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {
        node.name: length
        for node in functions
        if (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_public_names_have_docstrings() -> None:
    for module in modules():
        body = tree(module).body
        assert not body or ast.get_docstring(tree(module)), module
        for node in body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            # A shape of ten lines, drawn by a function of its name, needs no sentence; nor does `main`.
            if named and node.name != "main" and (node.end_lineno or 0) - node.lineno > 10:
                assert ast.get_docstring(node), f"{module}.{node.name}"
