"""Run checks over a case."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.catalogue import CHECKS
from dfu_mlflow.diagnosis.check import Check
from dfu_mlflow.diagnosis.finding import CannotRun, Finding, Outcome
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.diagnosis.ranking import ranked
from dfu_mlflow.errors import Interrupted
from dfu_mlflow.phases import phase
from dfu_mlflow.tracking import masked

Budget = Literal["cheap", "full"]
ENDED = "ended with"
"""How the reason of a check begins that raised what it should not."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        findings: worst first.
        outcomes: check id -> what it answered, in the order the checks ran.
        budget: how closely was looked.
        updates: optimizer updates that had been made, None where nothing says.
    """

    findings: tuple[Finding, ...]
    outcomes: dict[str, Outcome]
    budget: Budget = "full"
    updates: int | None = None

    @property
    def unable(self) -> dict[str, str]:
        """Check id -> why it could not run."""
        return {name: each.reason for name, each in self.outcomes.items() if isinstance(each, CannotRun)}

    def document(self) -> str:
        """`findings.json`."""
        return json.dumps([finding.document() for finding in self.findings], indent=1, ensure_ascii=False)


def diagnose(
    case: Case,
    budget: Budget = "full",
    between_checks: Callable[[str], None] = lambda name: None,
    checks: Sequence[Check] = CHECKS,
) -> Diagnosis:
    """Examine a case.

    Args:
        budget: `cheap` leaves the probes out.
        between_checks: called with each check's id before it runs; may raise to stop.
    """
    outcomes: dict[str, Outcome] = {}
    with phase("diagnosing", len(checks), "checks") as progress:
        for check in checks:
            progress.detail(check.id)
            if budget == "cheap" and check.cost == "probe":
                outcomes[check.id] = CannotRun("a probe: left out by --budget cheap")
            else:
                between_checks(check.id)
                outcomes[check.id] = _asked(check, case)
            progress.advance()
    findings = ranked(each for each in outcomes.values() if isinstance(each, Finding))
    try:
        updates = case.updates()
    except Lacking:
        updates = None
    return Diagnosis(tuple(findings), outcomes, budget, updates)


def _asked(check: Check, case: Case) -> Outcome:
    try:
        return check.run(case)
    except Interrupted:
        raise
    except Exception as error:  # any: a defect, or a card that is too small, must not lose what the others found
        told = masked(error)[:300]  # names of image files name patients; a name that is cut in two is not seen
        return CannotRun(f"{ENDED} {type(error).__name__}: {told}")
