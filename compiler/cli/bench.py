"""``hone bench``: models and packages against other runtimes."""

from __future__ import annotations

import click

from hone.cli import options, output
from hone.cli.command import verb


@verb(
    "bench",
    example="hone bench net.hone --vs onnxruntime\n"
    "hone bench net.onnx net.hone --vs onnxruntime,openvino --threads 2 --json",
)
@click.argument("items", nargs=-1, required=True, metavar="MODEL|PACKAGE...")
@click.option(
    "--vs",
    "peers",
    type=options.names("onnxruntime", "openvino"),
    default="",
    metavar="NAMES",
    help="Other runtimes, with commas: onnxruntime,openvino.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    metavar="N",
    help="Interleaved rounds; up to five times as many until a ratio's interval is narrow.",
)
@options.threads
@options.shape
@options.as_json
def bench(
    items: tuple[str, ...],
    peers: tuple[str, ...],
    rounds: int,
    threads: int,
    shapes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure models and packages in one interleaved run, on the same inputs and threads.

    A ratio above 1 means faster than that runtime. One with a question mark is not shown: even
    with more rounds its interval is too wide to say anything, so the machine is too busy.
    """
    from hone import bench as bencher
    from hone.measure import Rounds
    from hone.progress import console
    from hone.report import numbers
    from hone.report.bench import BenchResult

    measured = bencher.bench(
        items,
        vs=peers,
        threads=threads,
        rounds=Rounds(rounds=rounds),
        shapes=options.read_shapes(shapes) if shapes else None,
        progress=console(),
    )
    result = BenchResult.of(measured)
    if as_json:
        output.write_json(result.to_json())
        return
    output.table(
        ("name", "precision", "median ms (95% CI)", *(f"vs {peer}" for peer in peers)),
        [
            (
                row.name,
                row.precision,
                numbers.timing(row.latency_ms),
                *(numbers.ratio(row.comparison(peer)) for peer in peers),
            )
            for row in result.results
        ],
        right="  >" + ">" * len(peers),
    )
