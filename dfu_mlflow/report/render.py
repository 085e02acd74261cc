"""A report as one HTML file."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dfu_mlflow.report.document import Report, Section

FOOTER = "<footer>"


def render(report: Report) -> str:
    """The document; every text is escaped, nothing is fetched when it opens."""
    sections = [render_section(section) for section in report.sections]  # escaped there
    return _environment().get_template("report.html.jinja").render(report=report, sections=sections)


def render_section(section: Section) -> str:
    """One section of a document."""
    identifier = section.title.lower().replace(" ", "-")
    return _environment().get_template("section.html.jinja").render(section=section, identifier=identifier)


def with_section(document: str, section: str) -> str:
    """A document that `render` made with one of `render_section` in the place of its namesake, else at its end."""
    opening = section.partition("\n")[0]
    before = re.compile(rf"{re.escape(opening)}.*?</section>\n", re.DOTALL)
    if before.search(document):
        return before.sub(lambda _: section, document, count=1)
    head, footer, tail = document.rpartition(FOOTER)
    return f"{head}{section}{footer}{tail}"


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
