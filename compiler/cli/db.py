"""``hone db``: look into a tuning database."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hone.cli import options, output
from hone.cli.command import verb
from hone.errors import UsageError

if TYPE_CHECKING:
    from hone.database import Database
    from hone.tuning.records import Entry


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
    records = _open(database, target, threads)
    facts = records.stats()
    entries = records.show()
    if as_json:
        output.write_json({**facts, "entries": [asdict(entry) for entry in entries]})
        return
    for warning in facts.pop("warnings"):
        output.note(f"warning: {warning}")
    output.pairs(facts.items())
    if entries:
        click.echo()
        _show_entries(entries)


@verb(
    "show",
    example="hone db show --database records\nhone db show fused_conv2d_relu --limit 3",
)
@click.argument("kernel", required=False)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    metavar="N",
    help="Records of a kernel, the best first.",
)
@options.database
@options.target
@options.threads
@options.as_json
def show(
    kernel: str | None,
    limit: int,
    database: Path | None,
    target: str,
    threads: int,
    as_json: bool,
) -> None:
    """List the kernels of a database, or the best records of KERNEL: times and tiles.

    KERNEL is a name, or the workload's hash where several kernels share a name. A tile lists the
    factors of each loop split.
    """
    records = _open(database, target, threads)
    for warning in records.stats()["warnings"]:
        output.note(f"warning: {warning}")
    entries = records.show()
    if kernel is None:
        if as_json:
            output.write_json({"entries": [asdict(entry) for entry in entries]})
        else:
            _show_entries(entries)
        return
    found = [entry for entry in entries if kernel in (entry.name, entry.workload)]
    if not found:
        raise UsageError(
            f"no kernel {kernel!r} in the database",
            where=str(records.folder),
            hint="`hone db show` lists the kernels",
        )
    listed = {entry: records.records(entry.workload)[:limit] for entry in found}
    if as_json:
        kernels = [
            {**asdict(entry), "best": [_summary(record) for record in best]}
            for entry, best in listed.items()
        ]
        output.write_json({"kernels": kernels})
        return
    rows = [
        (entry.workload, output.figure(row["mean_ms"]), " ".join(row["tile"]) or "-")
        for entry, best in listed.items()
        for row in map(_summary, best)
    ]
    output.table(("workload", "ms", "tile"), rows, right=" >")


def _open(database: Path | None, target: str, threads: int) -> Database:
    from hone.database import Database
    from hone.targets.target import resolve

    folder = database or options.DATABASE
    resolved = resolve(target)
    if not folder.is_dir():
        raise UsageError(
            "there is no tuning database",
            where=str(folder),
            hint="`hone tune` makes one, --database says where it is",
        )
    return Database(folder, resolved, threads=threads)


def _show_entries(entries: tuple[Entry, ...]) -> None:
    output.table(
        ("kernel", "workload", "records", "best ms", "untuned ms", "in the model"),
        [
            (
                entry.name,
                entry.workload,
                str(entry.records),
                output.figure(entry.best_ms),
                output.figure(entry.untuned_ms),
                str(asdict(entry).get("verdict") or "-"),
            )
            for entry in entries
        ],
        right="  >>>",
    )


def _summary(record: list[Any]) -> dict[str, Any]:
    """Return the mean time of a record, and the factors of each split of its trace."""
    trace, seconds = record[0], record[1]
    splits = [inputs[1:] for name, inputs, *_ in trace[0] if name == "Split"]
    return {
        "mean_ms": sum(seconds) / len(seconds) * 1e3,
        "tile": ["x".join("_" if f in ("None", None) else str(f) for f in row) for row in splits],
    }


db.add_command(stats)
db.add_command(show)
