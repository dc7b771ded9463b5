"""Compare hone with its peers: every reference network, each in one interleaved run.

``python benchmarks/peers.py [--only NAME] [--precision P] [--batch N] [--threads N] [--json]``.
Networks but the trained digits have random weights, so this compares speed, not accuracy; hone
compiles without tuning. bf16: OpenVINO is allowed it too; onnxruntime has no kernels for it on
processors and stays fp32. int8: everybody is given the QDQ model of onnxruntime's quantizer.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from networks import NAMES, PEERS, PRECISIONS, write

from hone import driver
from hone.bench import Bench, bench
from hone.importer import load
from hone.measure import Rounds


def compare(
    name: str, folder: Path, *, precision: str, batch: int, threads: int, rounds: int
) -> Bench:
    """Measure one network in hone and in every peer that is installed."""
    network = write(name, folder, precision=precision, batch=batch)
    package = driver.compile(load(network), threads=threads, precision=precision)
    # The peers take the model that lies beside the package and has the hash that it names.
    path = folder / f"{name}.hone"
    package.save(path)
    installed = [peer for peer in PEERS if find_spec(peer)]
    return bench([path], vs=installed, threads=threads, rounds=Rounds(rounds=rounds))


def rows(name: str, result: Bench) -> list[dict[str, Any]]:
    """Return one row for each contender, as JSON data."""
    return [
        {
            "network": name,
            "name": entry.name if entry.name in PEERS else "hone",
            "precision": entry.precision,
            "threads": result.threads,
            "latency_ms": {
                "median": entry.latency.median_ms,
                "p90": entry.latency.p90_ms,
                "ci95": entry.latency.ci95_ms,
                "samples": entry.latency.samples,
            },
            "ratio": {
                peer: {"ratio": speedup.ratio, "ci95": speedup.ci95}
                for peer, speedup in entry.ratio.items()
            },
        }
        for entry in result.results
    ]


def show(table: list[dict[str, Any]]) -> None:
    """Print the rows of one network."""
    for row in table:
        latency, ratios = row["latency_ms"], row["ratio"]
        versus = "  ".join(f"{peer} {value['ratio']:.2f}x" for peer, value in ratios.items())
        print(
            f"{row['network']:12} {row['name']:12} {row['precision']:5} "
            f"{latency['median']:9.4f} ms ({latency['ci95'][0]:.4f} to {latency['ci95'][1]:.4f})  "
            f"{versus}",
            flush=True,
        )


def main() -> int:
    """Run the comparisons that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", choices=NAMES, action="append", help="one network; repeatable")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    everything: list[dict[str, Any]] = []
    environment: dict[str, Any] = {}
    with TemporaryDirectory(prefix="hone-peers-") as folder:
        for name in arguments.only or NAMES:
            result = compare(
                name,
                Path(folder),
                precision=arguments.precision,
                batch=arguments.batch,
                threads=arguments.threads,
                rounds=arguments.rounds,
            )
            environment = result.environment
            table = rows(name, result)
            everything += table
            if not arguments.json:
                show(table)
    if arguments.json:
        print(json.dumps({"results": everything, "environment": environment}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
