"""Compare hone with its peers: every reference network, each in interleaved runs.

``python benchmarks/peers.py [--only NAME] [--precision P] [--batch N] [--threads N] [--runs N]
[--json]``. Prints one row of `RESULTS.md` for each network.
Networks but the trained digits have random weights, so this compares speed, not accuracy; hone
compiles without tuning. bf16: OpenVINO is allowed it too; onnxruntime has no kernels for it on
processors and stays fp32. int8: everybody is given the QDQ model of onnxruntime's quantizer.
Nothing else may run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from networks import NAMES, PRECISIONS, write
from runs import cells, compare, data, entry, middle

from hone import driver
from hone.bench import Bench
from hone.importer import load

HEAD = (
    "| network | hone ms | onnxruntime ms | OpenVINO ms | ratio to onnxruntime "
    "| ratio to OpenVINO | to the better |\n|---|---|---|---|---|---|---|"
)


def compiled(name: str, folder: Path, *, precision: str, batch: int, threads: int) -> Path:
    """Compile a network; its package lies beside the model that the peers are given."""
    network = write(name, folder, precision=precision, batch=batch)
    path = folder / f"{name}.hone"
    driver.compile(load(network), threads=threads, precision=precision).save(path)
    return path


def row(name: str, runs: list[Bench], package: str) -> str:
    """Return the row of a table in `RESULTS.md`."""
    latency = entry(middle(runs, package), package).latency
    return "| " + " | ".join([name, f"{latency.median_ms:.3g}", *cells(runs, package)]) + " |"


def main() -> int:
    """Run the comparisons that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", choices=NAMES, action="append", help="one network; repeatable")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runs", type=int, default=3, help="processes; the median is printed")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    everything = []
    if not arguments.json:
        print(HEAD, flush=True)
    for name in arguments.only or NAMES:
        with TemporaryDirectory(prefix="hone-peers-") as folder:
            package = compiled(
                name,
                Path(folder),
                precision=arguments.precision,
                batch=arguments.batch,
                threads=arguments.threads,
            )
            runs = compare(
                [package],
                threads=arguments.threads,
                rounds=arguments.rounds,
                runs=arguments.runs,
            )
        everything += [
            {"network": name, "results": data(run), "environment": run.environment} for run in runs
        ]
        if not arguments.json:
            print(row(name, runs, package.name), flush=True)
    if arguments.json:
        print(json.dumps({"runs": everything}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
