"""Which finding to mend first."""

from __future__ import annotations

from collections.abc import Iterable

from dfu_mlflow.diagnosis.finding import SEVERITIES, Finding

PRECEDENCE = (
    "nonfinite",
    "stale_cache",
    "text_mismatch",
    "same_noise_on_ranks",
    "ema_lag",
    "weights_not_moving",
    "wrong_schedule",
    "dead_loss_term",
    "dominant_loss_term",
    "resolution_off_native",
    "metric_input_broken",
    "guidance_too_high",
    "eval_oom",
    "rank_deadlock",
    "run_left_running",
    "memorisation",
    "patient_leakage",
    "prompt_prior",
    "class_ignored",
    "selection_on_noise",
    "noisy_validation",
    "small_sample_fid",
)
"""Causes before what they cause: weights that are broken, not the run's, or not shown make every later figure wrong; a
setting of training stands before one of sampling, and what only misleads the eye stands last."""
LEVELS = (0.8, 0.5)
"""Confidence from which a finding is sure, and likely; within a level precedence decides. Steps of equal width would
put 0.91 before 0.89, whatever causes what."""


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Worst first: by severity, then confidence by level, then cause before consequence."""
    return sorted(
        findings,
        key=lambda finding: (
            -SEVERITIES.index(finding.severity),
            sum(finding.confidence < level for level in LEVELS),
            PRECEDENCE.index(finding.id),
        ),
    )
