"""``hone compile``: a model into a package, as it is."""

from __future__ import annotations

from pathlib import Path

import click

from hone.cli import options, output
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
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "int8"]),
    default="fp32",
    show_default=True,
    help="Lowest precision of the kernels.",
)
@click.option("--calibration", metavar="DATA", help="Samples that int8 takes its ranges from.")
@click.option(
    "--allow-random-calibration",
    is_flag=True,
    help="Take random:N for calibration, which says nothing about real value ranges.",
)
@click.option(
    "--observer",
    type=click.Choice(["minmax", "moving_average", "percentile", "entropy", "mse"]),
    help="Chooses the ranges of int8; minmax when absent.",
)
@click.option(
    "--percentile",
    type=click.FloatRange(50, 100, min_open=True),
    help="Of the values in the range, with --observer percentile; 99.99 when absent.",
)
@click.option(
    "--equalize",
    type=click.Choice(["weights", "activations"]),
    help="Scale channels between layers first, to suit int8.",
)
@click.option(
    "--bias-correction", is_flag=True, help="Take int8's mean error out of each layer's bias."
)
@click.option(
    "--skip",
    multiple=True,
    metavar="LAYER",
    help="Layer that int8 skips: ID, name:GLOB, re:REGEX, op:TYPE, first, last; ! negates.",
)
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
    precision: str,
    calibration: str | None,
    allow_random_calibration: bool,
    observer: str | None,
    percentile: float | None,
    equalize: str | None,
    bias_correction: bool,
    skip: tuple[str, ...],
    shapes: tuple[str, ...],
    tune: float | None,
    database: Path | None,
    locked: bool,
    as_json: bool,
) -> None:
    """Compile a model into a package, checked against onnxruntime."""
    from hone import driver
    from hone.importer import load
    from hone.progress import console
    from hone.steps.options.int8 import Int8Step

    options.writable(to, model)
    chosen = {
        "--calibration": calibration,
        "--allow-random-calibration": allow_random_calibration,
        "--observer": observer,
        "--percentile": percentile,
        "--equalize": equalize,
        "--bias-correction": bias_correction,
        "--skip": skip,
    }
    useless = [name for name, value in chosen.items() if value]
    if useless and precision != "int8":
        raise click.UsageError(f"{useless[0]} is for --precision int8.")
    if percentile is not None and observer != "percentile":
        raise click.UsageError("--percentile is for --observer percentile.")
    int8 = Int8Step.model_validate(
        {
            "kind": "int8",
            "observer": observer or "minmax",
            "percentile": percentile,
            "equalize": equalize,
            "bias_correction": bias_correction,
            "skip": list(skip),
        }
    )
    package = driver.compile(
        load(model, options.read_shapes(shapes)),
        target=target,
        threads=threads,
        precision=precision,
        tune_seconds=tune,
        database=database,
        locked=locked,
        calibration=calibration,
        int8=int8 if any((observer, percentile, equalize, bias_correction, skip)) else None,
        allow_random_calibration=allow_random_calibration,
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
