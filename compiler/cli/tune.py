"""``hone tune``: fill a database with better schedules."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hone.cli import int8_options, options, output
from hone.cli.command import verb

if TYPE_CHECKING:
    from hone.tuning.choices import LoweringResult


@verb(
    "tune",
    example="hone tune net.onnx --target host --budget 10m --database records\n"
    "hone tune net.onnx --precision int8 --calibration data.npz --budget 10m",
)
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
@int8_options.precision
@options.goal
@options.database
@options.shape
@options.as_json
def tune(
    model: Path,
    budget: float,
    target: str,
    threads: int,
    goal: str,
    database: Path | None,
    shapes: tuple[str, ...],
    as_json: bool,
    **precision: Any,
) -> None:
    """Search for better schedules of a model's kernels and keep every record.

    The kernels depend on precision and goal: give what `hone compile` will be
    given. From a minute on, the ways to lower each layer are searched first. A
    record is used where it made the running model faster: the last column.

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
        wanted=int8_options.wanted(**precision),
        goal=goal,
        progress=console(),
    )
    if as_json:
        output.write_json({"database": str(folder), **asdict(result)})
        return
    whole_ms = sum(kernel.model_ms or 0.0 for kernel in result.kernels)
    output.table(
        (
            *("kernel", "calls", "tried", "failed", "untuned ms", "before ms", "after ms"),
            *("of the model", "in the model"),
        ),
        [
            (
                kernel.name,
                str(kernel.calls),
                str(kernel.trials),
                str(kernel.failed),
                *map(output.figure, (kernel.untuned_ms, kernel.before_ms, kernel.after_ms)),
                _share(kernel.model_ms, whole_ms),
                str(kernel.verdict or "-"),
            )
            for kernel in result.kernels
        ],
        right=" >>>>>>> ",
    )
    for kernel in result.quarantined:
        output.note(f"given up: {kernel.kernel}: {kernel.reason}")
    if result.lowering is not None:
        _show_lowering(result.lowering)
    if result.model_speedup is not None:
        output.note(
            f"the kernels with confirmed records make the model {result.model_speedup:.2f} times "
            "as fast as without"
        )
    click.echo(f"{result.records} records in {result.elapsed_s:.0f} s, kept in {folder}")
    if result.exhausted:
        output.note("every search space was searched to its end")


def _share(part_ms: float | None, whole_ms: float) -> str:
    return "-" if part_ms is None or not whole_ms else f"{100 * part_ms / whole_ms:.0f}%"


def _show_lowering(found: LoweringResult) -> None:
    """Say what the search for ways to lower layers brought."""
    text = f"{found.tried} of {found.choices} ways to lower layers were tried"
    if found.speedup is not None:
        text += f": {found.speedup:.2f} times as fast with {len(found.decided)} of them"
    elif not found.failure:
        text += "; none makes the model faster"
    output.note(text)
    for point, option in sorted(found.decided.items()):
        output.note(f"  {point}: {option}")
    if found.failure:
        output.note(f"warning: {found.failure}")
