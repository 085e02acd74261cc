"""All checks, in the order they run: cheap ones first."""

from __future__ import annotations

from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.checks.class_ignored import ClassIgnored
from dfu_mlflow.diagnosis.checks.dead_loss_term import DeadLossTerm
from dfu_mlflow.diagnosis.checks.dominant_loss_term import DominantLossTerm
from dfu_mlflow.diagnosis.checks.ema_lag import EmaLag
from dfu_mlflow.diagnosis.checks.eval_oom import EvalOom
from dfu_mlflow.diagnosis.checks.guidance_too_high import GuidanceTooHigh
from dfu_mlflow.diagnosis.checks.memorisation import Memorisation
from dfu_mlflow.diagnosis.checks.metric_input_broken import MetricInputBroken
from dfu_mlflow.diagnosis.checks.noisy_validation import NoisyValidation
from dfu_mlflow.diagnosis.checks.nonfinite import Nonfinite
from dfu_mlflow.diagnosis.checks.patient_leakage import PatientLeakage
from dfu_mlflow.diagnosis.checks.prompt_prior import PromptPrior
from dfu_mlflow.diagnosis.checks.rank_deadlock import RankDeadlock
from dfu_mlflow.diagnosis.checks.resolution_off_native import ResolutionOffNative
from dfu_mlflow.diagnosis.checks.run_left_running import RunLeftRunning
from dfu_mlflow.diagnosis.checks.same_noise_on_ranks import SameNoiseOnRanks
from dfu_mlflow.diagnosis.checks.selection_on_noise import SelectionOnNoise
from dfu_mlflow.diagnosis.checks.small_sample_fid import SmallSampleFid
from dfu_mlflow.diagnosis.checks.stale_cache import StaleCache
from dfu_mlflow.diagnosis.checks.text_mismatch import TextMismatch
from dfu_mlflow.diagnosis.checks.weights_not_moving import WeightsNotMoving
from dfu_mlflow.diagnosis.checks.wrong_schedule import WrongSchedule

CHECKS: tuple[Check, ...] = (
    Nonfinite(),
    EmaLag(),
    WeightsNotMoving(),
    WrongSchedule(),
    DeadLossTerm(),
    DominantLossTerm(),
    SmallSampleFid(),
    SelectionOnNoise(),
    NoisyValidation(),
    SameNoiseOnRanks(),
    RunLeftRunning(),
    RankDeadlock(),
    EvalOom(),
    ResolutionOffNative(),
    PatientLeakage(),
    StaleCache(),
    TextMismatch(),
    PromptPrior(),
    GuidanceTooHigh(),
    MetricInputBroken(),
    ClassIgnored(),
    Memorisation(),
)
"""One a catalogue entry."""
