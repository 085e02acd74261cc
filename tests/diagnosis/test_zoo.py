"""The zoo's bookkeeping: every entry of the catalogue has a fault, every setting is valid, the table counts right."""

from __future__ import annotations

import json
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pytest

from benchmarks import zoo_components
from benchmarks.incident import SETTINGS, components, mended
from benchmarks.zoo import parse, plans, read_journal, table
from benchmarks.zoo_faults import FAULTS, HEALTHY, PAIRS
from benchmarks.zoo_lab import Injection, Lab
from dfu_mlflow.diagnosis.catalogue import CHECKS
from dfu_mlflow.objective import Objective

BY_CONFIGURATION = (
    "ema_lag",
    "dominant_loss_term",
    "weights_not_moving",
    "guidance_too_high",
    "resolution_off_native",
    "prompt_prior",
    "small_sample_fid",
    "class_ignored",
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("zoo"))


def run(kind: str, name: str, strength: str, seed: int, *found: str) -> dict[str, Any]:
    findings = [{"id": each, "severity": "warning"} for each in found]
    facts = {"kind": kind, "name": name, "strength": strength, "seed": seed}
    return {"key": f"{kind} {name} {strength} {seed}", **facts, "findings": findings, "run_s": 9.0, "diagnose_s": 8.0}


def test_every_entry_of_the_catalogue_has_a_fault() -> None:
    assert sorted(FAULTS) == sorted(check.id for check in CHECKS)
    assert {name for pair in PAIRS for name in pair} <= set(FAULTS)
    assert len(HEALTHY) == 20


@pytest.mark.parametrize("name", BY_CONFIGURATION)
def test_settings_of_faults_are_valid(name: str, lab: Lab) -> None:
    weaker, stronger = (make(lab, 0) for make in FAULTS[name])
    assert weaker.change or weaker.patches
    assert lab.config(0, weaker.change) != lab.config(0, {})
    lab.config(0, stronger.change)


def test_settings_of_healthy_runs_and_of_the_incident_are_valid(lab: Lab) -> None:
    for seed, change in enumerate(HEALTHY):
        lab.config(seed, change)
    assert lab.config(0, SETTINGS).sampling.guidance_scale == 12.0


def test_a_component_is_put_back_after_the_training(lab: Lab) -> None:
    sound = Objective.__call__
    (patch,) = FAULTS["nonfinite"][1](lab, 0).patches
    with patch():
        assert Objective.__call__ is not sound
    assert Objective.__call__ is sound


@pytest.mark.parametrize("name", ["metric_input_broken", "nonfinite", "text_mismatch", "dead_loss_term", "stale_cache"])
def test_components_take_what_the_sound_ones_take(name: str, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A component of another signature would end the run with an error instead of the fault."""
    kept: list[tuple[object, object]] = []

    def keep(target: object, name: str, value: object) -> None:
        kept.append((getattr(target, name), value))

    monkeypatch.setattr(zoo_components, "setattr", keep, raising=False)
    for make in FAULTS[name]:
        for patch in make(lab, 0).patches:
            with patch():
                pass
    for sound, faulty in kept:
        assert callable(sound)
        assert callable(faulty)
        parameters = [each for each in signature(sound).parameters.values() if each.default is Parameter.empty]
        signature(faulty).bind(
            *(None for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.POSITIONAL_ONLY))
        )


def test_both_faults_of_a_pair_are_put_in(lab: Lab) -> None:
    both: Injection = FAULTS["ema_lag"][1](lab, 0) + FAULTS["metric_input_broken"][1](lab, 0)
    assert both.change["ema.decay"] == 0.999
    assert len(both.patches) == 1


def test_each_run_is_planned_once() -> None:
    keys = [plan.key for plan in plans(parse([]))]
    assert len(keys) == len(set(keys)) == 2 * 3 * len(FAULTS) + len(HEALTHY) + len(PAIRS)
    assert [
        plan.key for plan in plans(parse(["--faults", "nonfinite", "--seeds", "4", "--healthy", "0", "--pairs", "0"]))
    ] == [
        "fault nonfinite weaker 4",
        "fault nonfinite stronger 4",
    ]


def test_the_table_counts_by_strength_and_by_half_of_the_seeds() -> None:
    journal = [
        run("fault", "ema_lag", "stronger", 0, "ema_lag"),
        run("fault", "ema_lag", "stronger", 1, "prompt_prior", "ema_lag"),
        run("fault", "ema_lag", "stronger", 2, "ema_lag"),
        run("healthy", "0", "", 0),
        run("healthy", "1", "", 1, "ema_lag"),
        run("pair", "ema_lag+prompt_prior", "stronger", 0, "nonfinite", "prompt_prior", "ema_lag"),
        run("pair", "ema_lag+nonfinite", "stronger", 0, "nonfinite"),
        {**run("fault", "nonfinite", "weaker", 0, "nonfinite"), "error": "KeyError"},
    ]
    text = table(journal)
    assert "| `ema_lag` | - | - | 1/1 | 1/2 | prompt_prior |" in text
    assert "| `nonfinite` | 0/1 | - | - | - | nonfinite |" in text
    assert "stronger: 67% of 3 runs" in text
    assert "without a finding above a note: 1/2" in text
    assert "both in the top three: 1/2" in text


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert read_journal(path) == []
    path.write_text(json.dumps(run("healthy", "0", "", 0)) + '\n{"key": "fa', encoding="utf-8")
    assert [one["key"] for one in read_journal(path)] == ["healthy 0  0"]


def test_the_incident_acts_on_a_finding_by_its_change_or_by_mending_the_code() -> None:
    parts = list(components())
    change, faulty = mended({"id": "ema_lag", "fix": {"ema.warmup": True}}, SETTINGS, parts)
    assert change["ema.warmup"] is True
    assert faulty == parts
    change, faulty = mended({"id": "text_mismatch", "fix": {}}, SETTINGS, parts)
    assert change == SETTINGS
    assert faulty == [name for name in parts if name != "text_mismatch"]
