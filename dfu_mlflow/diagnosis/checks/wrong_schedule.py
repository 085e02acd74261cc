"""A learning-rate schedule that does not do what was planned."""

from __future__ import annotations

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import Figure, Finding, Healthy
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.schedules import lr_factor

WRONG = 0.15
"""Largest difference between planned and used rate, as a share of the peak; rounding gives 0.01."""
OFFSETS = (-1, 0, 1)
"""Trainers log the rate of a step before it, with it or after it; in a short warm-up one step is a large part."""
UNFINISHED = 0.25
"""Share of the peak rate above which a decaying schedule has not ended."""
FEW = 8


class WrongSchedule(Check):
    """The logged learning rate beside the plan, step by step."""

    id = "wrong_schedule"
    needs = ("step/lr", "train.lr_schedule")
    cost = "cheap"

    def examine(self, case: Case) -> Finding | Healthy:
        """Against the plan where it is known, else only whether a finished run's rate ended low."""
        rates = case.curve("step/lr", "train/lr", "lr")
        schedule = str(case.setting("train.lr_schedule"))
        if len(rates) < FEW:
            raise Lacking(f"{len(rates)} learning rates were logged, {FEW} are needed to see a schedule")
        peak = float(case.settings.get("train.learning_rate", max(rate for _, rate in rates)))
        total = self._planned(case)
        evidence = {"final_rate": Figure(rates[-1][1]), "peak_rate": Figure(peak)}
        if total is None:
            if schedule not in ("cosine", "linear"):
                return Healthy(evidence)
            if case.life is None or case.life.status != "FINISHED":
                raise Lacking("neither the number of updates planned is known nor that the run has finished")
            share = rates[-1][1] / peak
            evidence["final_share"] = Figure(share, f"below {UNFINISHED}")
            return self._finding(case, evidence, 0.7) if share > UNFINISHED else Healthy(evidence)
        warmup = int(case.settings.get("train.warmup_steps", 0))
        plans = [
            {step: peak * lr_factor(schedule, max(0, step - 1 + offset), warmup, total) for step, _ in rates}  # type: ignore[arg-type]
            for offset in OFFSETS
        ]
        gaps = [max(abs(rate - plan[step]) for step, rate in rates) / peak for plan in plans]
        gap = min(gaps)
        evidence |= {
            "largest_difference": Figure(gap, f"below {WRONG} of the peak"),
            "planned_final_rate": Figure(plans[gaps.index(gap)][rates[-1][0]]),
        }
        return self._finding(case, evidence, 0.9) if gap > WRONG else Healthy(evidence)

    def _finding(self, case: Case, evidence: dict[str, Figure], confidence: float) -> Finding:
        plain = case.settings.get("train.gradient_accumulation_steps") == 1
        return self.found(
            "warning",
            confidence,
            evidence,
            "The learning rate did not follow its schedule: most often the scheduler is stepped in micro-steps while "
            "its "
            "length counts updates (or the other way round), so that it never reaches its end. Count both in updates."
            + (" No setting mends this: the code that steps the scheduler must." if plain else ""),
            {} if plain else {"train.gradient_accumulation_steps": 1},
        )

    def _planned(self, case: Case) -> int | None:
        try:
            return case.planned()
        except Lacking:
            return None
