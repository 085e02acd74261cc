"""Faults that configuration and curves show: each at two strengths, each gone when its change is applied."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import merge, validate
from dfu_mlflow.diagnosis.case import CLASSES_TAG, STEPS_TAG, Case, Life
from dfu_mlflow.diagnosis.checks.rank_deadlock import at_evaluation
from dfu_mlflow.diagnosis.diagnose import diagnose
from dfu_mlflow.diagnosis.finding import CannotRun, Finding, Healthy
from dfu_mlflow.diagnosis.ranking import ranked

Points = Mapping[int, float]


def case(
    curves: Mapping[str, Points] | None = None,
    tags: Mapping[str, str] | None = None,
    life: Life | None = None,
    **settings: Any,
) -> Callable[[Case], Case]:
    """Makes a sound run ill; `__` in a name stands for a dot."""
    changed = {name.replace("__", "."): value for name, value in settings.items()}

    def fall_ill(sound: Case) -> Case:
        return replace(
            sound,
            curves={**sound.curves, **(curves or {})},
            tags={**sound.tags, **(tags or {})},
            settings={**sound.settings, **changed},
            life=life or sound.life,
        )

    return fall_ill


def epochs(*values: float) -> dict[int, float]:
    return dict(enumerate(values, start=1))


def require_fix(finding: Finding) -> None:
    """A diff that validates, or words about code."""
    if not finding.fix:
        assert "No setting mends this" in finding.explanation, finding
    tree: dict[str, Any] = {}
    for key, value in finding.fix.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = merge(tree, value)
    validate(RunConfig, tree)


def lagging(decay: float, updates: int) -> Callable[[Case], Case]:
    steps = dict.fromkeys(range(1, updates + 1), 0.5)
    return case({"ema/coverage": {}, "step/loss": steps}, ema__decay=decay, ema__warmup=False)


PERCEPTUAL = {
    "loss__perceptual_loss__enabled": True,
    "loss__perceptual_loss__max_timestep": 250,
    "train__batch_size": 16,
}
NOISE = np.random.default_rng(0).normal(size=20)

FAULTS: dict[str, tuple[str, Callable[[Case], Case]]] = {
    "ema measured, stuck": ("ema_lag", case({"ema/coverage": epochs(0.03)}, ema__warmup=False)),
    "ema measured, lagging": ("ema_lag", case({"ema/coverage": epochs(0.4)})),
    "ema by decay": ("ema_lag", lagging(0.999, 32)),
    "ema in bfloat16": (
        "ema_lag",
        case({"ema/coverage": {}}, ema__warmup=False, ema__decay=0.999, ema__dtype="bfloat16"),
    ),
    "dead term, as in the founding run": (
        "dead_loss_term",
        case(
            {
                "train/loss": epochs(0.1404, 0.1404, 0.1404),
                "train/loss_perceptual": epochs(0.0608, 0.0608, 0.0608),
                "train/grad_share_perceptual": epochs(0, 0, 0),
            },
            **PERCEPTUAL,
        ),
    ),
    "dead term, weak": (
        "dead_loss_term",
        case(
            {
                "train/loss": epochs(0.08, 0.08),
                "train/loss_perceptual": epochs(0.002, 0.002),
                "train/grad_share_perceptual": epochs(0, 0),
            },
            **PERCEPTUAL,
        ),
    ),
    "dominant term": ("dominant_loss_term", case({"train/grad_share_perceptual": epochs(0.97, 0.95)}, **PERCEPTUAL)),
    "dominant term, weak": (
        "dominant_loss_term",
        case({"train/grad_share_perceptual": epochs(0.6, 0.62)}, **PERCEPTUAL),
    ),
    "not finite": ("nonfinite", case(tags={"exit.reason": "user error: the gradient was not finite for 5 steps"})),
    "some steps skipped": ("nonfinite", case({"train/nonfinite_steps": {6: 30.0}})),
    "one loss not a number": ("nonfinite", case({"train/loss": epochs(0.4, np.nan, 0.4)})),
    "the loss ends as not a number": ("nonfinite", case({"step/loss": {1: 0.5, 2: 0.4, 3: np.nan}})),
    "schedule in micro-steps": (
        "wrong_schedule",
        case(
            {"step/lr": {step: 1e-3 * 0.5 * (1 + np.cos(np.pi * step / 2640)) for step in range(1, 661)}},
            train__lr_schedule="cosine",
            train__warmup_steps=0,
        ),
    ),
    "weights still": (
        "weights_not_moving",
        case({"model/displacement": epochs(1e-5), "val/loss": {0: 0.507, 1: 0.507}}),
    ),
    "weights slow": (
        "weights_not_moving",
        case({"model/displacement": epochs(9e-4), "val/loss": {0: 0.507, 1: 0.502}}),
    ),
    "weights slow, pictures where they were": (
        "weights_not_moving",
        case(
            {
                "model/displacement": epochs(4.5e-4, 5.5e-4),
                "val/loss": {0: 0.543, 1: 0.520, 2: 0.514},
                "eval/fd_progress": epochs(0.008, 0.02),
                "eval/kid_progress": epochs(0.03, 0.05),
            }
        ),
    ),
    "noisy validation": (
        "noisy_validation",
        case({"val/loss": {0: 0.12, **epochs(0.109, 0.095, 0.081, 0.095, 0.105, 0.074, 0.1)}}),
    ),
    "selection on noise": (
        "selection_on_noise",
        case({"eval/kid": epochs(*(2.25 * (1 + 0.09 * NOISE)))}),
    ),
    "a rise inside the first one's interval": (
        "selection_on_noise",
        case(
            {
                "eval/kid": epochs(4.32, 5.14, 4.89, 5.08, 5.3, 5.26, 5.44),
                "eval/kid_high": epochs(5.82, 6.89, 6.61, 6.87, 7.02, 6.96, 7.15),
            }
        ),
    ),
    "few pictures": ("small_sample_fid", case(evaluation__samples=50, evaluation__best_metric="fid")),
    "same draws": ("same_noise_on_ranks", case(tags={"draws.rank0": "ab", "draws.rank1": "ab"})),
    "one seed": ("same_noise_on_ranks", case(runtime__num_processes=5, runtime__seed_by_rank=False)),
    "out of memory": (
        "eval_oom",
        case(
            {"epoch": {epoch: float(epoch) for epoch in range(6)}},
            {"exit.reason": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"},
        ),
    ),
    "left running": ("run_left_running", case(life=Life("RUNNING", 9000.0))),
    "deadlock": (
        "rank_deadlock",
        case(
            {"epoch": {epoch: float(epoch) for epoch in range(6)}},
            life=Life("RUNNING", 9000.0),
            runtime__num_processes=5,
            runtime__seed_by_rank=True,
        ),
    ),
    "deadlock of a run of this project": (
        "rank_deadlock",
        case(
            {"epoch": {epoch: float(epoch) for epoch in range(6)}},
            {f"draws.rank{rank}": str(rank) for rank in range(4)},
            Life("RUNNING", 9000.0),
        ),
    ),
    "far below native": ("resolution_off_native", case(data__resolution_px=16)),
    "guidance 12": ("guidance_too_high", case(sampling__guidance_scale=12.0)),
    "stock captions": ("prompt_prior", case(prompts__style="detailed")),
    "classes alike": (
        "class_ignored",
        case({"eval/class_accuracy": epochs(0.33), "eval/class_accuracy_high": epochs(0.39)}),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_stands_first(name: str, sound: Case) -> None:
    wanted, fall_ill = FAULTS[name]
    found = diagnose(fall_ill(sound), "cheap").findings
    assert found, "nothing found"
    assert found[0].id == wanted, [finding.id for finding in found]
    assert found[0].severity != "note"
    assert 0 < found[0].confidence <= 1


@pytest.mark.parametrize("name", FAULTS)
def test_a_change_is_one_that_the_configuration_takes(name: str, sound: Case) -> None:
    """Or the sentence says that no setting mends it."""
    for finding in diagnose(FAULTS[name][1](sound), "cheap").findings:
        require_fix(finding)


@pytest.mark.parametrize("name", FAULTS)
def test_a_change_changes_something(name: str, sound: Case) -> None:
    """No finding tells a run to set what it has set; where nothing is left, the words say so."""
    ill = FAULTS[name][1](sound)
    for finding in diagnose(ill, "cheap").findings:
        assert finding.fix or "No setting mends this" in finding.explanation, finding
        assert not finding.fix.items() & ill.settings.items()


def test_findings_json_holds_exactly_what_was_promised(sound: Case) -> None:
    content = json.loads(diagnose(FAULTS["ema by decay"][1](sound), "cheap").document())
    assert set(content[0]) == {"id", "severity", "confidence", "evidence", "explanation", "fix"}
    assert content[0]["evidence"]["one_less_decay_to_the_updates"] == pytest.approx(1 - 0.999**32)
    assert content[0]["fix"]["ema.warmup"] is True


def test_the_founding_run_is_taken_apart_in_order(sound: Case) -> None:
    """Each finding goes when its change is applied; the last run has none."""
    ill = case(
        {
            "ema/coverage": epochs(0.008, 0.008, 0.008),
            "train/loss": epochs(0.1404, 0.1404, 0.1404),
            "train/loss_perceptual": epochs(0.0608, 0.0608, 0.0608),
            "train/grad_share_perceptual": epochs(0, 0, 0),
        },
        prompts__style="detailed",
        sampling__guidance_scale=12.0,
        ema__decay=0.999,
        ema__warmup=False,
        **PERCEPTUAL,
    )(sound)
    seen = []
    while found := diagnose(ill, "cheap").findings:
        first = found[0]
        seen.append(first.id)
        ill = replace(ill, settings={**ill.settings, **first.fix})
        if first.id == "ema_lag":  # what a run with that change logs
            ill = replace(ill, curves={**ill.curves, "ema/coverage": epochs(0.96)})
    assert seen == ["ema_lag", "dead_loss_term", "guidance_too_high", "prompt_prior"]


def test_two_faults_are_both_named(sound: Case) -> None:
    both = case({"ema/coverage": epochs(0.03)}, data__resolution_px=16, ema__warmup=False)(sound)
    assert {finding.id for finding in diagnose(both, "cheap").findings[:3]} >= {"ema_lag", "resolution_off_native"}


def test_a_sure_cause_stands_before_a_surer_consequence() -> None:
    """Wrong embeddings before the average that lags, though its coverage is the surer figure."""
    lag, wrong = (
        Finding(name, "blocker", sure, {}, "", {}) for name, sure in (("ema_lag", 0.95), ("text_mismatch", 0.85))
    )
    doubtful = Finding("nonfinite", "blocker", 0.6, {}, "", {})
    assert ranked([doubtful, lag, wrong]) == [wrong, lag, doubtful]


def test_a_run_that_ended_before_its_first_update_is_not_accused_of_standing_still(sound: Case) -> None:
    """Memory ran out when the untouched base was evaluated: nothing had moved, and nothing could have."""
    reason = "RuntimeError: DefaultCPUAllocator: can't allocate memory"
    early = case({"model/displacement": {0: 0.0}, "step/loss": {0: 0.0}, "epoch": {}}, {"exit.reason": reason})(sound)
    diagnosis = diagnose(early, "cheap")
    assert diagnosis.findings[0].id == "eval_oom"
    assert diagnosis.unable["weights_not_moving"] == "no update has been made yet"


def test_a_short_run_is_not_accused_of_a_dead_term(sound: Case) -> None:
    """One epoch of four samples misses the term's window in a third of all runs."""
    short = case(
        {
            "train/loss": epochs(0.5),
            "train/loss_perceptual": epochs(0.1),
            "train/grad_share_perceptual": epochs(0.0),
        },
        **{**PERCEPTUAL, "train__batch_size": 4},
    )(sound)
    diagnosis = diagnose(short, "cheap")
    assert diagnosis.findings == ()
    assert "32%" in diagnosis.unable["dead_loss_term"]


@pytest.mark.parametrize("ended", [True, False])
def test_an_unfinished_run_of_unknown_length_is_not_accused_of_its_schedule(ended: bool, sound: Case) -> None:
    """Half a cosine is what half a run shows; of a finished one it is a fault."""
    half = {step: 1e-3 * 0.5 * (1 + np.cos(np.pi * step / 660)) for step in range(1, 331)}
    life = Life("FINISHED" if ended else "RUNNING", 60.0)
    change = {"train__lr_schedule": "cosine", "train__steps_per_epoch": None}
    ill = case({"step/lr": half}, life=life, **change)(sound)
    assert isinstance(diagnose(ill, "cheap").outcomes["wrong_schedule"], Finding if ended else CannotRun)
    told = replace(ill, tags={**ill.tags, STEPS_TAG: "110"}, settings={**ill.settings, "train.warmup_steps": 0})
    assert isinstance(diagnose(told, "cheap").outcomes["wrong_schedule"], Healthy)


@pytest.mark.parametrize(
    ("step", "evaluated", "every", "wanted"),
    [
        (0, -1, 1, True),
        (100, 0, 1, True),
        (98, 0, 1, True),
        (94, 0, 1, False),
        (100, 1, 1, False),
        (350, 2, 2, False),
        (300, 2, 2, False),
        (400, 2, 2, True),
        (500, 4, 2, True),
    ],
)
def test_the_last_step_says_whether_an_evaluation_was_due(
    step: int, evaluated: int, every: int, wanted: bool, sound: Case
) -> None:
    """100 steps an epoch, 5 epochs, every fifth step logged; the configuration leaves the steps to the data."""
    curves: dict[str, Points] = {"step/loss": {step: 0.5}, "epoch": {evaluated: 0.0} if evaluated >= 0 else {}}
    change = {"train__steps_per_epoch": None, "train__epochs": 5, "evaluation__every_epochs": every}
    assert at_evaluation(case(curves, {STEPS_TAG: "100"}, **change)(sound)) is wanted


def test_without_the_steps_of_an_epoch_nobody_says_what_ran_out_of_memory(sound: Case) -> None:
    ill = case(tags={"exit.reason": "CUDA out of memory"}, train__steps_per_epoch=None)(sound)
    assert "how many steps an epoch has" in diagnose(ill, "cheap").unable["eval_oom"]


def test_a_loss_that_is_not_a_number_belongs_to_one_check(sound: Case) -> None:
    """The first such step is told, and the checks that read the curve go by its other points."""
    validation = {**sound.curves["val/loss"], 4: np.nan, 5: np.inf}
    ill = case({"val/loss": validation}, evaluation__best_metric="val_loss")(sound)
    diagnosis = diagnose(ill, "cheap")
    assert [(each.id, each.severity) for each in diagnosis.findings] == [("nonfinite", "warning")]
    assert diagnosis.findings[0].evidence["first_nonfinite val/loss"].value == 4
    assert "4 validation losses" in diagnosis.unable["noisy_validation"]
    lost = replace(ill, curves={"step/loss": {1: np.nan}})
    assert diagnose(lost, "cheap").findings[0].severity == "blocker"


def test_choosing_by_another_curve_ends_the_choice_among_noise(sound: Case) -> None:
    ill = FAULTS["selection on noise"][1](sound)
    (finding,) = diagnose(ill, "cheap").findings
    assert finding.fix == {"evaluation.best_metric": "val_loss"}
    mended = replace(ill, settings={**ill.settings, **finding.fix})
    assert isinstance(diagnose(mended, "cheap").outcomes["selection_on_noise"], Healthy)
    validation = {"val/loss": epochs(*(0.4 * (1 + 0.04 * NOISE)))}
    still = diagnose(case(validation)(mended), "cheap").outcomes["selection_on_noise"]
    assert isinstance(still, Finding)
    assert still.fix == {"evaluation.validation_images": 128}


@pytest.mark.parametrize(
    ("values", "below", "wanted"),
    [((0.2, 0.35, 0.3, 0.5, 0.6), 0.05, Healthy), ((0.6, 0.5, 0.64, 0.52, 0.57), 0.2, Finding)],
)
def test_a_figure_that_is_better_when_larger_is_read_that_way(
    values: tuple[float, ...], below: float, wanted: type, sound: Case
) -> None:
    """A rise is a trend; a best one whose interval, which reaches down by `below`, holds all others is luck."""
    curves = {"eval/coverage": epochs(*values), "eval/coverage_low": epochs(*(value - below for value in values))}
    outcome = diagnose(case(curves, evaluation__best_metric="coverage")(sound), "cheap").outcomes["selection_on_noise"]
    assert isinstance(outcome, wanted)
    assert outcome.evidence["best_epoch"].value == 1 + values.index(max(values))


def test_chance_is_what_the_number_of_classes_makes_it(sound: Case) -> None:
    """Four classes, of which two are drawn often enough for curves of their own; where nothing tells, none is said."""
    curves = {"eval/I/kid": epochs(1.0), "eval/P/kid": epochs(1.0), "eval/class_accuracy": epochs(0.45)}
    told = diagnose(case(curves, {CLASSES_TAG: "4"})(sound), "cheap").outcomes["class_ignored"]
    assert isinstance(told, Healthy)
    untold = replace(case(curves)(sound), tags={})
    assert "how many classes" in diagnose(untold, "cheap").unable["class_ignored"]
    prompts = dict.fromkeys("abcd", "a foot")
    by_prompts = replace(untold, settings={**untold.settings, "prompts.phase_prompts": prompts})
    assert by_prompts.classes() == 4


@pytest.mark.parametrize(("samples", "wanted"), [(1500, Healthy), (240, Finding)])
def test_the_distance_that_chooses_is_judged(samples: int, wanted: type, sound: Case) -> None:
    """1,280 dimensions, though Inception's 2,048 are logged beside them."""
    curves = {"eval/fid": epochs(300.0, 200.0), "eval/fd": epochs(3.0, 2.0)}
    ill = case(curves, evaluation__best_metric="fd", evaluation__samples=samples)(sound)
    outcome = diagnose(ill, "cheap").outcomes["small_sample_fid"]
    assert isinstance(outcome, wanted)
    assert outcome.evidence["samples"].healthy == "above 1280"
    if isinstance(outcome, Finding):
        assert outcome.explanation.startswith("FD of 240 pictures")


def test_one_of_two_epochs_does_not_make_a_term_dominant(sound: Case) -> None:
    """The lower of two is their median: one odd batch decides nothing."""
    odd = case({"train/grad_share_perceptual": epochs(0.1, 0.9)}, **PERCEPTUAL)(sound)
    assert isinstance(diagnose(odd, "cheap").outcomes["dominant_loss_term"], Healthy)
