"""What failing runs share, for a person: a table in the terminal and `report.html`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from dfu_mlflow.diagnosis.shared_causes import Comparison, SharedCause
from dfu_mlflow.report.document import Report, Section, Table
from dfu_mlflow.report.figures import number

SHOWN = 10
"""Explanations that the terminal shows; the report shows all."""
LIKELY = 0.05
COLUMNS = ("what the failing runs share", "failing runs with it", "others with it", "correlation", "by chance")


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Best explanation first, then what always changed together."""
    console = console or Console()
    table = TerminalTable(title=_title(comparison), show_lines=True)
    for heading in COLUMNS:
        table.add_column(heading, overflow="fold")
    for cause in comparison.causes[:SHOWN]:
        table.add_row(*(Text(cell) for cell in _row(cause)), style="bold" if cause.chance < LIKELY else "")
    console.print(table)
    for sentence in sentences(comparison):
        console.print(Text(sentence))


def sentences(comparison: Comparison) -> tuple[str, ...]:
    """What can be concluded, and what cannot."""
    causes = comparison.causes
    if not causes:
        return ("The runs differ in nothing that was recorded.", *comparison.notes)
    likely = [cause for cause in causes if cause.chance < LIKELY]
    best = _together(causes[0])
    told = (
        f"{best} explains the outcome best (by chance {causes[0].chance:.2g})."
        if likely
        else f"Nothing is told apart from chance with {len(comparison.attempts)} runs; {best} comes nearest "
        f"(by chance {causes[0].chance:.2g})."
    )
    return (told, *(confounding(cause) for cause in causes if cause.confounded), *comparison.notes)


def confounding(cause: SharedCause) -> str:
    """That factors changed together, and the two runs that would separate them."""
    names = list(cause.factors())
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    start = f"confounded: {listed} always changed together; no comparison of these runs can tell which it is."
    if cause.fixed:
        return f"{start} `study` cannot separate them: {', '.join(cause.fixed)} must be the same in all of its runs."
    return f"{start} Separate them: {names[0]} as in the failing runs with the rest as in the others, and the reverse."


def comparison_report(comparison: Comparison) -> Report:
    """The document."""
    rows = tuple(_row(cause) for cause in comparison.causes)
    method = (
        "Correlation of the trait with the rank of the outcome. The chance is of the largest correlation among all "
        "rows when outcomes are shuffled over the runs: it holds however many rows there are."
    )
    runs = tuple(
        (each.name, "none" if each.value is None else number(each.value), "fails" if each.fails else "")
        for each in comparison.attempts
    )
    return Report(
        _title(comparison),
        sentences(comparison),
        (
            Section("What they share", (method,), tables=(Table("Best explanation first.", COLUMNS, rows),)),
            Section("Runs", (), tables=(Table("Best first.", ("run", "outcome", ""), runs),)),
        ),
        (),
    )


def _title(comparison: Comparison) -> str:
    failing = sum(each.fails for each in comparison.attempts)
    return f"What {failing} failing runs share that {len(comparison.attempts) - failing} others do not"


def _together(cause: SharedCause) -> str:
    return ", with ".join(trait.text for trait in cause.traits)


def _row(cause: SharedCause) -> tuple[str, ...]:
    return (
        "\n".join(trait.text for trait in cause.traits),
        f"{cause.failing_with} of {cause.failing_with + cause.failing_without}",
        f"{cause.other_with} of {cause.other_with + cause.other_without}",
        f"{cause.correlation:.2f}",
        f"{cause.chance:.2g}",
    )
