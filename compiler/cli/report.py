"""``hone report``: show a build's report, convert it, compare two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hone.cli import options, output
from hone.cli.command import Verb, verb
from hone.errors import PerformanceError

if TYPE_CHECKING:
    from hone.report.schema import Report


class ReportGroup(click.Group):
    """``report FILE`` is ``report show FILE``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the verb that may be left out."""
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["show", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write both ways to call it."""
        for name, command in self.commands.items():
            shown = ctx.command_path if name == "show" else f"{ctx.command_path} {name}"
            formatter.write_usage(shown, " ".join(command.collect_usage_pieces(ctx)))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of both."""
        for name, command in self.commands.items():
            options = [p for p in command.get_params(ctx) if isinstance(p, click.Option)]
            records = [record for p in options if (record := p.get_help_record(ctx))]
            with formatter.section("Options" if name == "show" else f"Options of {name}"):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write an example of both."""
        for command in self.commands.values():
            if isinstance(command, Verb):
                command.format_epilog(ctx, formatter)


@click.group(cls=ReportGroup)
def report() -> None:
    """Show the REPORT.json of a build, convert it, or compare two of them."""


@verb(
    "show",
    example="hone report build/report.json\nhone report build/report.json --html -o report.html",
)
@click.argument("file", type=options.PATH, metavar="REPORT.json")
@click.option("--html", "form", flag_value="html", help="One offline HTML file with charts.")
@click.option("--md", "form", flag_value="md", help="A Markdown table, for a CI summary.")
@click.option("--junit", "form", flag_value="junit", help="JUnit XML: a case per step and gate.")
@click.option("--json", "form", flag_value="json", help="The report itself, checked.")
@click.option("-o", "--output", "to", type=options.PATH, metavar="FILE", help="Default: stdout.")
def show(file: Path, form: str | None, to: Path | None) -> None:
    """Print the table of steps, or convert the report."""
    from hone.report.schema import Report

    if form is None and to is not None:
        raise click.UsageError("-o needs one of --html, --md, --junit or --json.")
    loaded = Report.read(file)
    if form is None:
        show_table(loaded)
        return
    text = _render(loaded, form)
    if to is None:
        click.echo(text, nl=False)
        return
    output.write_text(to, text)
    output.note(f"wrote {to}")


@verb("diff", example="hone report diff old/report.json new/report.json --fail-slower 3%")
@click.argument("old", type=options.PATH)
@click.argument("new", type=options.PATH)
@click.option(
    "--fail-slower",
    type=options.percentage,
    metavar="SHARE",
    help="Exit 5 when a shipped row is slower by more than this, outside noise.",
)
@options.as_json
def diff(old: Path, new: Path, fail_slower: float | None, as_json: bool) -> None:
    """Compare two reports row by row; overlapping confidence intervals count as the same."""
    from hone.report import diff as differ
    from hone.report.schema import Report

    comparison = differ.compare(Report.read(old), Report.read(new))
    if as_json:
        output.write_json(comparison.to_json())
    else:
        rows = [differ.cells(row) for row in comparison.rows]
        output.table(differ.COLUMNS, rows, right=differ.RIGHT)
        if comparison.precisions:
            click.echo()
            changes = [differ.precision_cells(change) for change in comparison.precisions]
            output.table(differ.PRECISION_COLUMNS, changes)
    for warning in comparison.warnings:
        output.note(f"warning: {warning}")
    if fail_slower is None:
        return
    slower = comparison.slower(fail_slower)
    if slower:
        listed = ", ".join(f"{row.name} {100 * (row.slowdown or 0):+.1f}%" for row in slower)
        raise PerformanceError(
            f"at most {100 * fail_slower:g}% slower is allowed, measured outside noise: {listed}",
            where=str(new),
        )


report.add_command(show)
report.add_command(diff)


def show_table(loaded: Report) -> None:
    """Print the table of steps, and what else a reader must know."""
    from hone.report import precision, table

    lines = table.lines(loaded)
    rows = [(line.name, line.verdict, *line.figures) for line in lines]
    output.table(table.columns(loaded), rows, right=table.RIGHT)
    # Beside eight columns a reason would be a tower of words.
    reasons = [(line.name, line.judgement) for line in lines if line.reason]
    if reasons:
        click.echo()
        output.pairs(reasons)
    for row in precision.shipped(loaded):
        for found in precision.tables(loaded, row) if row.precisions else ():
            click.echo(f"\n{row.name}: {found.title.lower()}")
            output.table(found.columns, found.rows, right=found.right)
    if loaded.tuning is not None:
        hits, total = loaded.tuning.hits, loaded.tuning.total
        output.note(f"tuning records for {hits} of {total} kernels")
    for note in loaded.notes:
        output.note(f"note: {note}")


def _render(loaded: Report, form: str) -> str:
    if form == "html":
        from hone.report import html

        return html.render(loaded)
    if form == "md":
        from hone.report import markdown

        return markdown.render(loaded)
    if form == "junit":
        from hone.report import junit

        return junit.render(loaded)
    return loaded.to_json()
