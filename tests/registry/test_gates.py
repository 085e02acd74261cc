"""Each clause of the gate says yes and no for its own reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dfu_mlflow.config.gates import GatesConfig
from dfu_mlflow.config.measures import MemorisationConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.comparison import compare
from dfu_mlflow.types import Estimate
from registry.clean_process import CleanTrial
from registry.gates import Answer, Evidence, check_metrics, clauses, judge

NOT_WORSE = Estimate(0.01, -0.02, 0.04)
WORSE = Estimate(0.05, 0.02, 0.08)
BETTER = Estimate(-0.05, -0.08, -0.02)
COPIES = {"copy_excess_low": 0.1, "copy_excess": 0.2}


def evidence(**change: Any) -> Evidence:
    """A challenger that passes: not worse than the champion, no copies, nobody told apart."""
    good = Evidence(
        trial=CleanTrial(True, "drew", 1.0),
        memorisation=MemorisationConfig(),
        figures={
            "eval/kid_progress": 0.4,
            "memorisation/pixels/copy_excess": 0.0,
            "memorisation/pixels/copy_excess_low": -0.02,
            "memorisation/pixels/copy_excess_high": 0.02,
            "memorisation/membership_auc": 0.55,
            "memorisation/membership_auc_low": 0.5,
        },
        compared={
            "kid": compare("kid", NOT_WORSE, "smaller", 240),
            **by_class("I", NOT_WORSE),
            **by_class("P", BETTER),
        },
        rival="the champion (dfu-sampler/1)",
        labels=("I", "P"),
    )
    return replace(good, **change)


def by_class(label: str, difference: Estimate, pictures: int = 80) -> dict[str, Any]:
    return {f"{label}/kid": compare(f"{label}/kid", difference, "smaller", pictures)}


def quality(difference: Estimate, pictures: int = 240) -> dict[str, Any]:
    return {"compared": {"kid": compare("kid", difference, "smaller", pictures)}}


def gates(**sections: Any) -> GatesConfig:
    return GatesConfig.model_validate(sections)


def answers(found: Evidence, config: GatesConfig) -> dict[str, Answer]:
    return {answer.clause: answer for answer in judge(found, config)}


def test_all_clauses_hold_and_carry_their_figures() -> None:
    found = answers(evidence(), gates())
    assert list(found) == ["loads", "findings", "quality", "classes", "memorisation"]
    assert all(answer.passed for answer in found.values())
    assert found["quality"].figures == {"difference": 0.01, "low": -0.02, "high": 0.04}
    assert found["classes"].figures["P/kid/high"] == -0.02
    assert found["memorisation"].figures["membership_auc"] == 0.55


@pytest.mark.parametrize(
    ("clause", "change", "sections", "said"),
    [
        ("quality", quality(WORSE), {}, "kid: worse"),
        ("quality", quality(NOT_WORSE, 20), {}, "no verdict, 20 pictures are fewer than 30"),
        ("quality", {"compared": {}, "notes": {"kid": "too few photographs"}}, {}, "too few photographs"),
        ("quality", {}, {"quality": {"metric": "fid"}}, "fid was not compared: known are kid"),
        ("quality", {}, {"quality": {"against_champion": "better"}}, "it must be better"),
        ("quality", {"first": True}, {}, "it must be better"),
        ("quality", {}, {"quality": {"margin": 0.03}}, "reaches further than gates.quality.margin 0.03"),
        ("classes", {"compared": by_class("R", WORSE)}, {}, "R/kid: worse"),
        ("classes", {"compared": {"kid": compare("kid", NOT_WORSE, "smaller", 240)}}, {}, "too few pictures of each"),
        ("classes", {"compared": {}, "notes": {"kid": "too few"}}, {}, "kid was not compared: too few"),
        ("memorisation", {"figures": {f"memorisation/sscd/{name}": value for name, value in COPIES.items()}}, {},
         "sscd/copy_excess is 0.2, at least 0.1; memorisation.max_copy_excess allows 0"),
        ("memorisation", {"figures": {"memorisation/membership_auc": 1.0}}, {}, "membership_auc is 1"),
        ("memorisation", {"figures": {}, "notes": {"memorisation": "12 photographs"}}, {}, "12 photographs"),
        ("findings", {"findings": [{"id": "ema_lag", "severity": "blocker", "fix": "lower ema.decay"}]}, {},
         "ema_lag lower ema.decay"),
        ("findings", {}, {"findings": {"required": True}}, "diagnose was not run"),
        ("findings", {"findings": [], "findings_budget": "cheap"}, {"findings": {"required": True}},
         "the run's findings are cheap: diagnose it with --budget full"),
        ("findings", {"findings": []}, {"findings": {"required": True}}, "not known to be full"),
        ("loads", {"trial": CleanTrial(False, "it does not load", 1.0)}, {}, "it does not load"),
        ("success", {}, {"success": {"metric": "kid_progress", "above": 0.5}}, "missed: kid_progress above 0.5"),
        ("success", {}, {"success": {"metric": "fid", "below": 100}}, "cannot be told: fid was not computed"),
    ],
)  # fmt: skip
def test_a_refusal_is_by_its_own_clause_and_says_why(
    clause: str, change: dict[str, Any], sections: dict[str, Any], said: str
) -> None:
    answer = answers(evidence(**change), gates(**sections))[clause]
    assert not answer.passed
    assert said in answer.sentence


@pytest.mark.parametrize(
    ("change", "sections"),
    [
        ({"first": True, "labels": ("I",), **quality(BETTER)}, {}),  # of one class alone nothing is given by class
        ({"first": True}, {"quality": {"against_base": "not_worse"}}),
        ({}, {"quality": {"margin": 0.05}}),
        (
            {"compared": {**evidence().compared, "coverage": compare("coverage", WORSE, "larger", 240)}},
            {"quality": {"metric": "coverage"}},
        ),
        (
            {"findings": [{"id": "prompt_prior", "severity": "warning"}], "findings_budget": "full"},
            {"findings": {"required": True}},
        ),
        ({"findings": [], "findings_budget": "cheap"}, {}),
        ({}, {"success": {"metric": "kid_progress", "above": 0.3}}),
        ({"figures": {}}, {"memorisation": {"required": False}}),
        ({"figures": {}}, {"memorisation": {"enabled": False}}),
    ],
)
def test_what_passes(change: dict[str, Any], sections: dict[str, Any]) -> None:
    assert all(answer.passed for answer in judge(evidence(**change), gates(**sections)))


def test_a_class_with_few_pictures_passes_and_is_named() -> None:
    found = {**evidence().compared, **by_class("R", WORSE, 20)}
    answer = answers(evidence(compared=found, labels=("I", "P", "R")), gates())["classes"]
    assert answer.passed
    assert "too few pictures of R" in answer.sentence


def test_switched_off_clauses_are_not_asked() -> None:
    off = {name: {"enabled": False} for name in ("loads", "quality", "classes", "memorisation", "findings")}
    assert clauses(gates(**off)) == ()


@pytest.mark.parametrize(("section", "said"), [("quality", "cmmd, contrast_w1"), ("classes", "contrast_w1, coverage")])
def test_a_figure_that_no_evaluation_gives_is_told_early(section: str, said: str) -> None:
    check_metrics(gates())
    with pytest.raises(UserError, match=f"--gates.{section}.metric nonsense: give one of .*{said}"):
        check_metrics(gates(**{section: {"metric": "nonsense"}}))
