"""Tune reference networks for a while, then compare them with their peers in one interleaved run.

``python benchmarks/tuned.py [--only NAME] [--precision P] [--batch N] [--seconds N] [--threads N]
[--database DIR] [--json]``. Precisions and peers as in `peers.py`.
Prints one row of `RESULTS.md` for each network: hone before and after tuning and every peer that is
installed, all in one interleaved run. Nothing else may run on the machine meanwhile.
Records are kept in the database: a second call goes on where the first one ended.
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
from hone.bench import bench
from hone.importer import load
from hone.measure import Rounds
from hone.progress import console
from hone.quantized import Wanted
from hone.tune import TuneResult

NETWORKS = ("resnet18", "resnet50", "mobilenetv2", "bert-mini")
TUNED = "tuned.hone"
UNTUNED = "untuned.hone"


def measure(
    name: str,
    folder: Path,
    *,
    precision: str,
    batch: int,
    seconds: float,
    threads: int,
    rounds: int,
    database: Path,
) -> dict[str, Any]:
    """Tune one network and compare it; return the figures as JSON data."""
    model = load(write(name, folder, precision=precision, batch=batch))
    found = driver.tune(
        model,
        threads=threads,
        budget_s=seconds,
        database=database,
        wanted=Wanted(precision=precision),
        progress=console(),
    )
    for package, records in ((TUNED, database), (UNTUNED, None)):
        driver.compile(model, threads=threads, precision=precision, database=records).save(
            folder / package
        )
    result = bench(
        [folder / TUNED, folder / UNTUNED],
        vs=[peer for peer in PEERS if find_spec(peer)],
        threads=threads,
        rounds=Rounds(rounds=rounds),
    )
    rows = {entry.name: entry for entry in result.results}
    latency = {key: entry.latency.median_ms for key, entry in rows.items()}
    return {
        "network": name,
        "precision": precision,
        "batch": batch,
        "seconds": seconds,
        "threads": threads,
        "latency_ms": latency,
        "over_untuned": latency[UNTUNED] / latency[TUNED],
        "ratio": {
            key: {"ratio": speedup.ratio, "ci95": speedup.ci95}
            for key, speedup in rows[TUNED].ratio.items()
        },
        "search": search(found),
        "environment": result.environment,
    }


def search(found: TuneResult) -> dict[str, Any]:
    """Return what the session did, as JSON data."""
    lowering = found.lowering
    return {
        "trials": found.trials,
        "failed": sum(kernel.failed for kernel in found.kernels),
        "confirmed": sum(kernel.verdict == "confirmed" for kernel in found.kernels),
        "kernels": len(found.kernels),
        "model_speedup": found.model_speedup,
        "lowerings_tried": None if lowering is None else lowering.tried,
        "lowerings": None if lowering is None else lowering.decided,
        "lowering_speedup": None if lowering is None else lowering.speedup,
    }


def row(figures: dict[str, Any]) -> str:
    """Return the row of a table in `RESULTS.md`."""
    latency = figures["latency_ms"]
    ratios = {key: f"{value['ratio']:.2f}" for key, value in figures["ratio"].items()}
    cells = [
        f"{figures['network']} {figures['precision']}",
        f"{latency[TUNED]:.3g}",
        f"{latency[UNTUNED]:.3g}",
        *(f"{latency[peer]:.3g}" if peer in latency else "-" for peer in PEERS),
        f"{figures['over_untuned']:.2f}",
        *(ratios.get(peer, "-") for peer in PEERS),
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| network | tuned ms | untuned ms | onnxruntime ms | OpenVINO ms | over untuned "
    "| over onnxruntime | over OpenVINO |\n|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", choices=NAMES, action="append", help="repeatable")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600.0, help="tuning of each network")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--database", type=Path, default=Path(".hone", "tuning"))
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    everything = []
    if not arguments.json:
        print(HEAD)
    for name in arguments.only or NETWORKS:
        with TemporaryDirectory(prefix="hone-tuned-") as folder:
            figures = measure(
                name,
                Path(folder),
                precision=arguments.precision,
                batch=arguments.batch,
                seconds=arguments.seconds,
                threads=arguments.threads,
                rounds=arguments.rounds,
                database=arguments.database,
            )
        everything.append(figures)
        if not arguments.json:
            print(row(figures), flush=True)
    if arguments.json:
        print(json.dumps({"results": everything}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
