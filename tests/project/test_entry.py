"""How entry points take their command line and how they end."""

from __future__ import annotations

import os
import py_compile
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dfu_mlflow import entry
from dfu_mlflow.errors import ConfigError, Interrupted, UserError
from entrypoints import test as checks_entry

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "options", "rest"),
    [
        ([], {"config": "tiny", "dry-run": "false"}, []),
        (["--config", "mine.yaml", "--seed", "1"], {"config": "mine.yaml", "dry-run": "false"}, ["--seed", "1"]),
        (["--seed", "1", "--config=x", "--dry-run"], {"config": "x", "dry-run": "true"}, ["--seed", "1"]),
        (["--dry-run", "--seed", "1"], {"config": "tiny", "dry-run": "true"}, ["--seed", "1"]),
        (["--dry-run", "false", "--a.b", "--c"], {"config": "tiny", "dry-run": "false"}, ["--a.b", "--c"]),
    ],
)
def test_split(arguments: list[str], options: dict[str, str], rest: list[str]) -> None:
    assert entry.split(arguments, {"config": "tiny", "dry-run": "false"}) == (options, rest)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("no images in a:\n give --data.root"), 2, "error: no images in a: give --data.root\n"),
        (ConfigError(["--a: unknown", "--b: unknown"]), 2, "error: --a: unknown; --b: unknown\n"),
        (Interrupted("SIGTERM, checkpoint step-12"), 130, "interrupted: SIGTERM, checkpoint step-12\n"),
        (KeyboardInterrupt(), 130, "interrupted: stopped by the user\n"),
        (PermissionError(13, "Permission denied", "/srv/closed"), 2, "error: /srv/closed: permission denied\n"),
    ],
)
def test_errors_end_in_one_line_and_a_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: Sequence[str]) -> int:
        raise error

    assert entry.run(main, []) == code
    assert capsys.readouterr().err == line


def test_codes_and_defects_pass_through() -> None:
    def main(arguments: Sequence[str]) -> int:
        if arguments:
            raise ZeroDivisionError(arguments[0])
        return 7

    assert entry.run(main, []) == 7
    with pytest.raises(ZeroDivisionError):
        entry.run(main, ["a defect"])


def test_checks_fail_together_and_keep_the_users_tracking_store(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every check runs though one fails, and none sees the run that `mlflow run` made for this process."""
    show = 'import os; print("seen:", [name for name in os.environ if name.startswith("MLFLOW_")])'
    monkeypatch.setattr(
        checks_entry,
        "checks",
        lambda config: {"first": ["json.tool", os.devnull], "second": ["timeit", "-n", "1", "-r", "1", show]},
    )
    for name in list(os.environ):
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_RUN_ID", "1" * 32)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert checks_entry.main([]) == 1
    output = capfd.readouterr()
    assert "seen: []" in output.out
    assert "failed: first" in output.err
    assert os.environ["MLFLOW_RUN_ID"] == "1" * 32


def test_fast_leaves_slow_tests_out_and_pytest_comes_last() -> None:
    config = checks_entry.ChecksConfig(fast=True, only="tests/config tests/project", workers=0)
    *_, (name, command) = checks_entry.checks(config).items()
    assert name == "pytest"
    assert command[command.index("-m") + 1] == "not slow"
    assert command[-2:] == ["tests/config", "tests/project"]
    assert "-m" not in checks_entry.checks(checks_entry.ChecksConfig())["pytest"]


def test_usage_is_not_reported_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(arguments: Sequence[str]) -> int:
        return int(os.environ["MLFLOW_DISABLE_TELEMETRY"] == arguments[0])

    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    assert entry.run(main, ["true"]) == 1
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    assert entry.run(main, ["false"]) == 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with an accelerator triton has work to do")
def test_a_process_without_an_accelerator_does_not_load_triton() -> None:
    program = (
        "import sys; from dfu_mlflow import entry\n"
        "def main(_):\n"
        "    import deepspeed, diffusers.models.unets.unet_2d_condition, peft, transformers.masking_utils\n"
        "    return 3 + ('torch._dynamo' in sys.modules) + 2 * ('triton.language' in sys.modules)\n"
        "sys.exit(entry.run(main, []))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False).returncode == 4


BYTECODE = (
    "import os, sys\n"
    "from dfu_mlflow import entry\n"
    "def main(arguments):\n"
    "    sys.path.insert(0, arguments[0])\n"
    "    from dfu_mlflow.lean_imports import loading_libraries\n"
    "    with loading_libraries():\n"
    "        import some_library\n"
    "    import gc\n"
    "    assert gc.isenabled() and gc.get_freeze_count()\n"
    "    print(some_library.__cached__, os.environ.get('PYTHONDONTWRITEBYTECODE'))\n"
    "    return 0\n"
    "sys.exit(entry.run(main))"
)


@pytest.mark.parametrize("case", ["installed without", "installed with", "the user's folder", "written as ever"])
def test_libraries_are_compiled_once(case: str, tmp_path: Path) -> None:
    """torch is a stand-in: what decides is whether it was installed with bytecode."""
    for name in ("torch", "some_library"):
        (tmp_path / f"{name}.py").write_text("VALUE = 1\n")
    named, cache = {"PYTHONPYCACHEPREFIX": str(tmp_path / "mine")}, tmp_path / "cache" / "dfu-mlflow" / "bytecode"
    if case == "installed with":
        beside = tmp_path / "__pycache__" / f"torch.{sys.implementation.cache_tag}.pyc"
        py_compile.compile(str(tmp_path / "torch.py"), cfile=str(beside))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": f"{tmp_path}:{ROOT}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment |= {} if case == "written as ever" else {"PYTHONDONTWRITEBYTECODE": "1"}
    environment |= named if case == "the user's folder" else {}
    command = [sys.executable, "-c", BYTECODE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("some_library*.pyc")}
    wanted = {"installed without": {"cache"}, "written as ever": {"__pycache__"}}
    assert written == wanted.get(case, set())
    if case == "installed without":
        assert done.stdout.split() == [str(next(cache.rglob("some_library*.pyc"))), "None"]


@pytest.mark.parametrize(
    "name", ["train", "evaluate", "sample", "serve", "promote", "diagnose", "study", "tune", "test"]
)
def test_help_names_every_setting_and_touches_nothing(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"entrypoints.{name}", "--help"]
    place = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=place, capture_output=True, text=True, timeout=120, check=True)
    assert f"-e {name}" in done.stdout.splitlines()[0]
    wanted = {"sample": "--sample.per_class 8", "serve": "--serve.port 8000", "test": "--fast False"}
    assert wanted.get(name, "--train.epochs 2") in done.stdout
    own = {
        "train": ["--launch none", "--processes (not set)", "--dry-run false", "--output_dir outputs/train"],
        "evaluate": ["--source models:/dfu-sampler@challenger", "--output_dir outputs/evaluate"],
        "diagnose": ["--run (not set)", "--budget full", "--runs (not set)", "--output_dir outputs/diagnose"],
        "promote": ["--model models:/dfu-sampler@challenger", "--rollback false", "--output_dir outputs/promote"],
        "study": ["--plan seed_claims", "--output_dir outputs/study/PLAN"],
    }
    for line in (*own.get(name, []), *([] if name == "test" else ["--config "])):
        assert done.stdout.count(f"\n  {line}") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_has_seen_enough_ends_it_quietly() -> None:
    program = (
        "import sys; from dfu_mlflow import entry\n"
        "def main(_):\n"
        "    for _ in range(100_000): print('word')\n"
        "sys.exit(entry.run(main, []))"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        writer.stdout.readline()
        writer.stdout.close()
        assert writer.stderr.read() == b""
        assert writer.wait(timeout=60) == 141


def test_another_broken_pipe_is_a_defect() -> None:
    program = (
        "import sys; from dfu_mlflow import entry\n"
        "def main(_): raise BrokenPipeError(32, 'a socket')\n"
        "sys.exit(entry.run(main, []))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert "a socket" in done.stderr


def test_a_file_where_a_folder_should_be_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()

    def main(_: Sequence[str]) -> int:
        (tmp_path / "file" / "below").mkdir(parents=True)
        return 0

    assert entry.run(main, []) == 2
    assert "file/below: not a directory" in capsys.readouterr().err
