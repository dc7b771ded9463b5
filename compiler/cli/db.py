"""``hone db``: look into a tuning database."""

from __future__ import annotations

from pathlib import Path

import click

from hone.cli import options, output
from hone.cli.command import verb


@click.group()
def db() -> None:
    """Look into a tuning database."""


@verb("stats", example="hone db stats --database records --target host")
@options.database
@options.target
@options.threads
@options.as_json
def stats(database: Path | None, target: str, threads: int, as_json: bool) -> None:
    """Show how many kernels and records a database has for a target, and how good they are.

    The database is .hone/tuning when not given.
    """
    from hone.database import Database
    from hone.targets.target import resolve

    records = Database(database or options.DATABASE, resolve(target), threads=threads)
    facts = records.stats()
    entries = records.show()
    if as_json:
        kernels = [
            {
                "name": entry.name,
                "workload": entry.workload,
                "records": entry.records,
                "best_ms": entry.best_ms,
                "untuned_ms": entry.untuned_ms,
            }
            for entry in entries
        ]
        output.write_json({**facts, "entries": kernels})
        return
    for warning in facts.pop("warnings"):
        output.note(f"warning: {warning}")
    output.pairs(facts.items())
    if entries:
        click.echo()
        output.table(
            ("kernel", "records", "best ms", "untuned ms"),
            [
                (
                    entry.name,
                    str(entry.records),
                    *(
                        "-" if ms is None else f"{ms:.4g}"
                        for ms in (entry.best_ms, entry.untuned_ms)
                    ),
                )
                for entry in entries
            ],
            right=" >>>",
        )


db.add_command(stats)
