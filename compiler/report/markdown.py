"""The report as Markdown, for a README or the summary page of a CI job."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hone.report import precision, table
from hone.report.schema import Report


def render(report: Report) -> str:
    """Return the table of steps, how it was measured, the notes, and the precision of layers."""
    text = markdown_table(table.columns(report), [line.cells for line in table.lines(report)])
    threads = "1 thread" if report.threads == 1 else f"{report.threads} threads"
    facts = [f"target {report.target}", threads]
    if isinstance(cpu := report.environment.get("cpu"), str):
        facts.append(cpu)
    if report.tuning is not None:
        facts.append(f"tuning records for {report.tuning.hits} of {report.tuning.total} kernels")
    text += f"\n{_escape(', '.join(facts))}\n"
    if report.notes:
        text += "\n" + "".join(f"- {_escape(note)}\n" for note in report.notes)
    for row in precision.shipped(report):
        for found in precision.tables(report, row):
            text += (
                f"\n#### {_escape(row.name)}: {found.title.lower()}\n\n{_escape(found.hint)}\n\n"
            )
            text += markdown_table(found.columns, found.rows)
    return text


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose cells are shown as they are, whatever they hold."""
    lines = [columns, ["---"] * len(columns), *([_escape(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _escape(text: str) -> str:
    # A layer may be called `a|b`, `<x>` or `*_y_*`; an escaped one is shown, never interpreted.
    text = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text).replace("<", "&lt;").replace(">", "&gt;")
