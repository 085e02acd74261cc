"""Every check, one suite: its id, its words, what it says of nothing, and of a healthy run."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.catalogue import CHECKS
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.diagnose import diagnose
from dfu_mlflow.diagnosis.finding import CannotRun, Finding, Healthy
from dfu_mlflow.diagnosis.ranking import PRECEDENCE

CATALOGUE = [
    "ema_lag",
    "dead_loss_term",
    "dominant_loss_term",
    "metric_input_broken",
    "text_mismatch",
    "weights_not_moving",
    "nonfinite",
    "guidance_too_high",
    "resolution_off_native",
    "prompt_prior",
    "noisy_validation",
    "selection_on_noise",
    "small_sample_fid",
    "patient_leakage",
    "memorisation",
    "class_ignored",
    "wrong_schedule",
    "same_noise_on_ranks",
    "stale_cache",
    "rank_deadlock",
    "eval_oom",
    "run_left_running",
]


def test_the_catalogue_is_covered_once() -> None:
    assert sorted(check.id for check in CHECKS) == sorted(CATALOGUE)
    assert sorted(PRECEDENCE) == sorted(CATALOGUE)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
def test_a_check_has_its_file_and_its_words(check: Check) -> None:
    module = importlib.import_module(f"dfu_mlflow.diagnosis.checks.{check.id}")
    assert inspect.getmodule(type(check)) is module
    assert module.__doc__
    assert type(check).__doc__
    assert check.needs
    assert check.cost in ("cheap", "probe")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
def test_nothing_at_hand_is_a_reason_not_an_error(check: Check) -> None:
    outcome = check.run(Case("nothing"))
    assert isinstance(outcome, CannotRun)
    assert len(outcome.reason) > 20


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
def test_a_healthy_run_has_nothing_above_a_note(check: Check, sound: Case) -> None:
    outcome = check.run(sound)
    assert not isinstance(outcome, Finding) or outcome.severity == "note"
    if check.cost == "cheap":
        assert isinstance(outcome, Healthy), outcome


def test_cheap_leaves_probes_out_and_says_so(sound: Case) -> None:
    diagnosis = diagnose(sound, "cheap")
    assert diagnosis.findings == ()
    assert "--budget cheap" in diagnosis.unable["memorisation"]
    assert diagnosis.document() == "[]"


def test_checks_do_not_know_mlflow() -> None:
    for path in (Path(inspect.getfile(Check)).parent).rglob("*.py"):
        assert "import mlflow" not in path.read_text(encoding="utf-8"), path
