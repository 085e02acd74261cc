"""The one interface of all checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.finding import CannotRun, Evidence, Finding, Healthy, Outcome, Severity
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.errors import UserError
from dfu_mlflow.tracking import masked

Cost = Literal["cheap", "probe"]


class Check(ABC):
    """Looks for one entry of the catalogue.

    Attributes:
        id: the catalogue's name.
        needs: what it looks at, for a person; it takes what of it is at hand.
        cost: `cheap` reads configuration and curves, `probe` loads the model.
    """

    id: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    cost: ClassVar[Cost]

    def run(self, case: Case) -> Outcome:
        """Examine the case; what is not at hand becomes a reason, never an error.

        A change tells only what differs from the run's settings.
        """
        try:
            outcome = self.examine(case)
        except (Lacking, UserError) as reason:
            return CannotRun(masked(reason))
        if isinstance(outcome, Healthy):
            return outcome
        news = {key: value for key, value in outcome.fix.items() if (key, value) not in case.settings.items()}
        return replace(outcome, fix=news)

    @abstractmethod
    def examine(self, case: Case) -> Finding | Healthy:
        """Look.

        Raises:
            Lacking: when something it needs is not at hand.
        """

    def found(
        self, severity: Severity, confidence: float, evidence: Evidence, explanation: str, fix: Mapping[str, Any]
    ) -> Finding:
        """A finding of this check."""
        return Finding(self.id, severity, confidence, evidence, explanation, fix)
