"""``hone compile``: a model into a package, as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hone.cli import int8_options, options, output
from hone.cli.command import verb


@verb(
    "compile",
    example="hone compile net.onnx --target host --threads 2 -o net.hone\n"
    "hone compile net.onnx --target rpi4 -o net.hone\n"
    "hone compile net.onnx --precision int8 --calibration data.npz --tune 10m -o net.hone",
)
@click.argument("model", type=options.PATH, metavar="MODEL.onnx")
@click.option(
    "-o",
    "--output",
    "to",
    type=options.PATH,
    required=True,
    metavar="OUT.hone",
    help="To write.",
)
@options.target
@options.threads
@int8_options.precision
@options.goal
@options.shape
@click.option("--tune", type=options.duration, metavar="TIME", help="Search so long first.")
@options.database
@click.option("--locked", is_flag=True, help="Exit 9 when a kernel has no tuning record.")
@options.as_json
def compile(
    model: Path,
    to: Path,
    target: str,
    threads: int,
    goal: str,
    shapes: tuple[str, ...],
    tune: float | None,
    database: Path | None,
    locked: bool,
    as_json: bool,
    **precision: Any,
) -> None:
    """Compile a model into a package, checked against onnxruntime."""
    from hone import driver
    from hone.importer import load
    from hone.progress import console

    options.writable(to, model)
    wanted = int8_options.wanted(**precision)
    package = driver.compile(
        load(model, options.read_shapes(shapes)),
        target=target,
        threads=threads,
        precision=wanted.precision,
        tune_seconds=tune,
        database=database,
        locked=locked,
        calibration=wanted.calibration,
        int8=wanted.int8,
        half=wanted.half,
        allow_random_calibration=wanted.allow_random_calibration,
        goal=goal,
        progress=console(),
    )
    package.save(to)
    facts = {
        "path": str(to),
        "target": target,
        "threads": threads,
        "precision": package.manifest.precision,
        "weights_bytes": package.weights_bytes,
        "package_bytes": package.size_bytes,
        "kernels": len(package.manifest.kernels),
    }
    if as_json:
        output.write_json(facts)
        return
    weights, whole = output.size(package.weights_bytes), output.size(package.size_bytes)
    click.echo(f"{to}: {whole}, {weights} of it weights, {facts['precision']} for {target}")
