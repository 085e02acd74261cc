"""Samples and metrics drawn from averaged weights that have hardly moved."""

from __future__ import annotations

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Evidence, Figure, Finding, Healthy, Severity
from dfu_mlflow.diagnosis.lacking import Lacking

LAGGING, STUCK = 0.6, 0.25
"""Coverage below which the average shows less than most of what was learned, and hardly any of it.

Measured on the embedded base: 0.96 after 60 updates with warm-up, 0.997 after 120. Decay 0.999 without warm-up covers
0.03 after 32 updates, 0.06 after 60, and passes 0.6 after 916.
"""
BF16_SPACING = 2.0**-8
"""Relative spacing of bfloat16: an update of less than half of it is rounded away, so (1 - decay) times the distance to
the live weights is lost."""
SHORT_DECAY = 0.9


class EmaLag(Check):
    """Coverage: displacement of the average over displacement of the live weights, beside 1 - decay^N."""

    id = "ema_lag"
    needs = ("curves or checkpoint with live and averaged weights", "ema.decay")
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """Measured coverage where there is one, else what decay and number of updates allow."""
        if case.settings.get("ema.enabled") is False:
            return Healthy({"ema": Figure("off")})
        evidence: dict[str, Figure] = {}
        dtype = self._dtype(case)
        expected = self._expected(case, evidence)
        measured = self._measured(case)
        if measured is None and expected is None:
            if case.bench is not None and case.bench.has_ema:
                case.bench.movement("ema")  # raises, with what is missing
            raise Lacking(
                "no ema/coverage was logged, no averaged weights are at hand, and nothing says that its decay does not "
                "warm up, as diffusers' average always does (ema.decay, --ema.warmup false)"
            )
        coverage = measured if measured is not None else expected
        assert coverage is not None
        name = "coverage" if measured is not None else "coverage_expected"
        evidence = {name: Figure(coverage, f"above {LAGGING}; near 1 at the end of training"), **evidence}
        if dtype is not None:
            evidence["dtype"] = Figure(dtype, "float32")
        decay = float(case.settings.get("ema.decay", 1.0))
        rounded = measured is None and dtype == "bfloat16" and decay > 1 - BF16_SPACING
        if coverage >= LAGGING and not rounded:
            return Healthy(evidence)
        return self._finding(case, evidence, coverage, measured is not None)

    def _finding(self, case: Case, evidence: Evidence, coverage: float, measured: bool) -> Finding:
        fix = {"ema.warmup": True, "ema.decay": SHORT_DECAY if _few(case) else 0.99}
        if fix.items() <= case.settings.items():
            fix = {"ema.enabled": False}
        judged_live = case.tags.get("best.weights") == "live"
        severity: Severity = "warning" if judged_live or coverage >= STUCK else "blocker"
        if case.settings.get("evaluation.ema") is False:  # nobody looks at the average
            severity = "note"
        lost = ""
        if "dtype" in evidence and evidence["dtype"].value == "bfloat16":
            lost = " It is kept in bfloat16, where most of its updates are rounded away."
        elsewhere = " The best checkpoint's samples came from the live weights." if judged_live else ""
        return self.found(
            severity,
            0.95 if measured else 0.7,
            evidence,
            f"The averaged weights have come {'' if measured else 'by their decay '}{100 * coverage:.1f} % of the way "
            f"that the live weights went, so samples and metrics drawn from them show the base.{lost}{elsewhere} Let "
            "the decay warm up, or look at the live weights.",
            fix,
        )

    def _measured(self, case: Case) -> float | None:
        if case.bench is not None and case.bench.has_ema:
            live, ema = case.bench.movement_if_known("live"), case.bench.movement_if_known("ema")
            if live is not None and ema is not None:
                return ema.displacement / live.displacement if live.displacement > 0 else None
        return case.last("ema/coverage") if case.curves.get("ema/coverage") else None

    def _dtype(self, case: Case) -> str | None:
        movement = case.bench.movement_if_known("ema") if case.bench is not None and case.bench.has_ema else None
        return case.settings.get("ema.dtype") if movement is None else movement.dtype

    def _expected(self, case: Case, evidence: dict[str, Figure]) -> float | None:
        if "ema.decay" not in case.settings:
            return None
        decay = float(case.settings["ema.decay"])
        evidence["decay"] = Figure(decay)
        if case.settings.get("ema.warmup") is not False:  # unknown: most trainers' averages warm up
            return None
        try:
            updates = case.updates()
        except Lacking:
            return None
        evidence["updates"] = Figure(float(updates))
        evidence["one_less_decay_to_the_updates"] = Figure(1 - decay**updates, f"above {LAGGING}")
        return 1 - decay**updates


def _few(case: Case) -> bool:
    try:
        return case.updates() < 100
    except Lacking:
        return False
