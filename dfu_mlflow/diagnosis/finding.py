"""What a check answers: a finding, a clean bill, or why it cannot say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Severity = Literal["note", "warning", "blocker"]
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "blocker")
"""Mildest first. A note is worth knowing, a warning costs quality, a blocker explains a run that does not learn."""


@dataclass(frozen=True)
class Figure:
    """Something measured.

    Attributes:
        value: a number, or a name where only a name says it.
        healthy: what a healthy run shows, in words.
    """

    value: float | str
    healthy: str = ""


Evidence = Mapping[str, Figure]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        id: the catalogue's name for it.
        severity: how much it costs.
        confidence: 0 to 1, that this is so.
        evidence: name -> what was measured.
        explanation: one or two sentences for a person.
        fix: configuration diff, dotted key -> value; empty where no setting mends it.
    """

    id: str
    severity: Severity
    confidence: float
    evidence: Evidence
    explanation: str
    fix: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """As `findings.json` holds it; what a healthy run shows stands beside each figure as `NAME.healthy`."""
        evidence: dict[str, float | str] = {}
        for name, figure in self.evidence.items():
            evidence[name] = figure.value
            if figure.healthy:
                evidence[f"{name}.healthy"] = figure.healthy
        return {
            "id": self.id,
            "severity": self.severity,
            "confidence": round(self.confidence, 3),
            "evidence": evidence,
            "explanation": self.explanation,
            "fix": dict(self.fix),
        }


@dataclass(frozen=True)
class Healthy:
    """The check looked and found nothing; what it saw."""

    evidence: Evidence


@dataclass(frozen=True)
class CannotRun:
    """The check could not look, and why."""

    reason: str


Outcome: TypeAlias = Finding | Healthy | CannotRun
