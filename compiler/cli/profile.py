"""``hone profile``: where the time of a model goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hone.cli import options, output
from hone.cli.command import verb

if TYPE_CHECKING:
    from hone.report.profile import ProfileResult


@verb(
    "profile",
    example="hone profile net.onnx --threads 2\nhone profile net.hone --json",
)
@click.argument("file", type=options.PATH, metavar="MODEL|PACKAGE")
@click.option(
    "--threads",
    type=options.THREADS,
    metavar="N",
    help="Threads of one run; default: 2, or the package's.",
)
@options.shape
@click.option(
    "--seconds",
    type=options.duration,
    default="2s",
    show_default=True,
    metavar="TIME",
    help="About how long to measure.",
)
@options.as_json
def profile(
    file: Path, threads: int | None, shapes: tuple[str, ...], seconds: float, as_json: bool
) -> None:
    """Time every kernel inside the running model and hold it against what the machine can do.

    A model is compiled without tuning first; a package says itself what its kernels do. GFLOP/s
    counts the integer operations of quantized kernels alike.

    The roofline is the least time that a kernel's operations and bytes need on this machine, over
    the time it took. The limits of the machine are measured once and kept in the cache folder.
    """
    result = _profile(file, threads, shapes, seconds)
    if as_json:
        output.write_json(result.to_json())
    else:
        _show(result)


def _profile(
    file: Path, threads: int | None, shapes: tuple[str, ...], seconds: float
) -> ProfileResult:
    from hone import profile as profiler
    from hone.progress import console
    from hone.report.profile import ProfileResult

    if options.is_package(file):
        if shapes:
            raise click.UsageError("--shape is for models: the shapes of a package are fixed.")
        from hone.package import Package

        package = Package.read(file)
        found = profiler.profile_package(
            package, threads=threads, seconds=seconds, progress=console()
        )
        return ProfileResult.of(found, path=str(file), kind="package")
    from hone.importer import load

    found = profiler.profile_model(
        load(file, options.read_shapes(shapes)),
        threads=threads or options.default_threads(),
        seconds=seconds,
        progress=console(),
    )
    return ProfileResult.of(found, path=str(file), kind="model")


def _show(result: ProfileResult) -> None:
    from hone.report import numbers
    from hone.report import profile as report

    rows = report.by_time(result.kernels)
    output.table(report.COLUMNS, [report.cells(row) for row in rows], right=report.RIGHT)
    click.echo()
    totals = result.totals
    run = numbers.milliseconds(totals.run_ms)
    pairs: list[tuple[str, object]] = [
        ("run", f"{run} ms on {result.threads} threads, median; kernels in {totals.runs} runs"),
        ("virtual machine", report.overhead(totals)),
        ("weights", output.size(result.weights_bytes)),
        ("activations", f"{output.size(totals.storage_bytes)}, as planned"),
    ]
    if result.roofline is not None:
        pairs += zip(("machine", "bandwidth"), report.limits(result.roofline), strict=True)
        if not result.roofline.quiet:
            output.note(
                "warning: other processes used the processors while the machine was measured; "
                "its limits may be too low, and are measured again the next time"
            )
    output.pairs(pairs)
