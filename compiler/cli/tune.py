"""``hone tune``: fill a database with better schedules."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from hone.cli import options, output
from hone.cli.command import verb


@verb("tune", example="hone tune net.onnx --target host --budget 10m --database records")
@click.argument("model", type=options.PATH, metavar="MODEL.onnx")
@click.option(
    "--budget",
    type=options.duration,
    default="10m",
    show_default=True,
    metavar="TIME",
    help="All the search may take, start-up included.",
)
@options.target
@options.threads
@options.database
@options.shape
@options.as_json
def tune(
    model: Path,
    budget: float,
    target: str,
    threads: int,
    database: Path | None,
    shapes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Search for better schedules of a model's kernels and keep every record.

    The database is .hone/tuning when not given. Ctrl-C keeps what was
    measured; running it again goes on from there.
    """
    from hone import driver
    from hone.importer import load
    from hone.progress import console

    folder = database or options.DATABASE
    result = driver.tune(
        load(model, options.read_shapes(shapes)),
        target=target,
        threads=threads,
        budget_s=budget,
        database=folder,
        progress=console(),
    )
    if as_json:
        output.write_json({"database": str(folder), **asdict(result)})
        return
    output.table(
        ("kernel", "calls", "tried", "failed", "untuned ms", "before ms", "after ms"),
        [
            (
                kernel.name,
                str(kernel.calls),
                str(kernel.trials),
                str(kernel.failed),
                *map(output.figure, (kernel.untuned_ms, kernel.before_ms, kernel.after_ms)),
            )
            for kernel in result.kernels
        ],
        right=" >>>>>>",
    )
    for kernel in result.quarantined:
        output.note(f"given up: {kernel.kernel}: {kernel.reason}")
    click.echo(f"{result.records} records in {result.elapsed_s:.0f} s, kept in {folder}")
    if result.exhausted:
        output.note("every search space was searched to its end")
