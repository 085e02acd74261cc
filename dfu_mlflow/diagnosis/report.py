"""A diagnosis for a person: a table in the terminal, a section of `report.html`, tags on the run."""

from __future__ import annotations

import yaml
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from dfu_mlflow.diagnosis.diagnose import Diagnosis
from dfu_mlflow.diagnosis.finding import CannotRun, Evidence, Figure, Finding, Healthy
from dfu_mlflow.diagnosis.prior_reliance import RELIANCE
from dfu_mlflow.report.document import Report, Section, Table
from dfu_mlflow.report.figures import number

COLOURS = {"blocker": "bold red", "warning": "yellow", "note": "cyan"}
SHOWN = 5
"""Figures of a finding that the terminal shows; the report shows all."""


BUDGET_TAG = "diagnosis.budget"
"""How closely a run's `findings.json` was made: `cheap` or `full`."""
UPDATES_TAG = "diagnosis.updates"
"""After how many optimizer updates."""


def findings_file(budget: str, before: str | None) -> str:
    """Where findings go: a cheap look never takes the place of a full one, it goes beside it.

    Args:
        budget: of the findings to be written.
        before: of those that lie there, None where there are none.
    """
    return "findings-cheap.json" if (budget, before) == ("cheap", "full") else "findings.json"


def print_diagnosis(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """Findings worst first, then what could not be looked at."""
    console = console or Console()
    if diagnosis.findings:
        table = TerminalTable(title="Findings, worst first", show_lines=True)
        for heading in ("finding", "what was measured", "what it means, and the change that mends it"):
            table.add_column(heading, overflow="fold")
        for finding in diagnosis.findings:
            title = Text(f"{finding.id}\n{finding.severity}, {finding.confidence:.0%} sure", COLOURS[finding.severity])
            told = f"{finding.explanation}\n\n{fix_text(finding)}"
            table.add_row(title, Text("\n".join(_measured(finding.evidence)[:SHOWN])), Text(told))
        console.print(table)
    else:
        console.print("Nothing found.")
    healthy = [name for name, each in diagnosis.outcomes.items() if isinstance(each, Healthy)]
    console.print(Text(f"looked at and found sound: {', '.join(healthy) or 'nothing'}"))
    if told := prior_sentence(diagnosis):
        console.print(Text(told))
    for check, reason in diagnosis.unable.items():
        console.print(Text(f"{check}: could not look, {reason}", "dim"))


def diagnosis_section(diagnosis: Diagnosis) -> Section:
    """Findings with all their figures; what was found sound; what could not be looked at."""
    rows = tuple(
        (
            each.id,
            f"{each.severity}, {each.confidence:.0%}",
            each.explanation,
            "; ".join(_measured(each.evidence)),
            fix_text(each),
        )
        for each in diagnosis.findings
    )
    found = Table("Worst first.", ("finding", "severity, confidence", "meaning", "measured", "change"), rows)
    sound = tuple(
        (name, "; ".join(_measured(each.evidence)))
        for name, each in diagnosis.outcomes.items()
        if isinstance(each, Healthy)
    )
    tables = [found] if rows else []
    tables += [Table("Found sound.", ("check", "measured"), sound)] if sound else []
    unable = tuple(diagnosis.unable.items())
    tables += [Table("Not looked at.", ("check", "because"), unable)] if unable else []
    return Section("Diagnosis", () if rows else ("Nothing found.",), tables=tuple(tables))


def diagnosis_report(name: str, diagnosis: Diagnosis) -> Report:
    """The section as a document of its own."""
    return Report(f"Diagnosis of {name}", summary(diagnosis), (diagnosis_section(diagnosis),), ())


def summary(diagnosis: Diagnosis) -> tuple[str, ...]:
    """One sentence a finding above a note, or that there is none."""
    grave = [f"{each.id}: {each.explanation}" for each in diagnosis.findings if each.severity != "note"]
    told = prior_sentence(diagnosis)
    return (*(grave or ["Nothing above a note was found."]), *([told] if told else []))


def prior_sentence(diagnosis: Diagnosis) -> str:
    """How much the pictures come from the prompt and the base, how little from the data; empty where not measured."""
    told = prior_figures(diagnosis)
    if not told:
        return ""
    value, low, high = (number(told[f"{RELIANCE}{end}"]) for end in ("", "_low", "_high"))
    return (
        f"prior reliance {value} [{low}, {high}]: the share of the way from the base's pictures to the photographs "
        "that the run's pictures have not gone."
    )


def prior_figures(diagnosis: Diagnosis) -> dict[str, float]:
    """Prior reliance with the ends of its interval, empty where it was not measured."""
    outcome = diagnosis.outcomes.get("prompt_prior")
    evidence = {} if outcome is None or isinstance(outcome, CannotRun) else outcome.evidence
    return {
        name: figure.value
        for name, figure in evidence.items()
        if name.startswith(RELIANCE) and not isinstance(figure.value, str)
    }


def finding_tags(diagnosis: Diagnosis) -> dict[str, str]:
    """`finding.ID` -> severity, `finding.first` -> the worst one's id, how closely was looked and after how many
    updates; a check that no longer finds anything says so."""
    tags = {f"finding.{name}": "sound" for name, each in diagnosis.outcomes.items() if isinstance(each, Healthy)}
    tags |= {f"finding.{each.id}": each.severity for each in diagnosis.findings}
    tags |= {name: f"{value:.4g}" for name, value in prior_figures(diagnosis).items()}
    first = diagnosis.findings[0].id if diagnosis.findings else "none"
    tags |= {} if diagnosis.updates is None else {UPDATES_TAG: str(diagnosis.updates)}
    return tags | {"finding.first": first, BUDGET_TAG: diagnosis.budget}


def fix_text(finding: Finding) -> str:
    """The change as flags."""
    if not finding.fix:
        return "no setting mends this"
    told = []
    for key, value in finding.fix.items():
        text = yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
        told.append(f"--{key} {text}")
    return " ".join(told)


def _measured(evidence: Evidence) -> list[str]:
    return [_line(name, figure) for name, figure in evidence.items()]


def _line(name: str, figure: Figure) -> str:
    value = figure.value if isinstance(figure.value, str) else number(figure.value)
    return f"{name} {value}{f' (healthy: {figure.healthy})' if figure.healthy else ''}"
