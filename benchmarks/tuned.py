"""Tune reference networks for a while, then compare them with their peers in interleaved runs.

``python benchmarks/tuned.py [--only NAME] [--precision P] [--batch N] [--seconds N] [--threads N]
[--runs N] [--database DIR] [--json]``. Precisions and peers as in `peers.py`.
Prints one row of `RESULTS.md` for each network: hone before and after tuning and every peer that is
installed, all of them in each run. Nothing else may run on the machine meanwhile.
What was decided, kernel by kernel, goes to the standard error. Records are kept in the database: a
second call goes on where the first one ended.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from networks import NAMES, PRECISIONS, write
from runs import cells, compare, data, entry, middle

from hone import driver
from hone.bench import Bench
from hone.importer import load
from hone.progress import console
from hone.quantized import Wanted
from hone.tune import TuneResult

NETWORKS = ("resnet18", "resnet50", "mobilenetv2", "bert-mini")
AFTER_S = 40.0
AFTER_SHARE = 0.1
"""Of a session's seconds, for compiling both packages: at most so long, and at most a share."""

TUNED = "tuned.hone"
UNTUNED = "untuned.hone"


def tuned(
    name: str,
    folder: Path,
    *,
    precision: str,
    batch: int,
    seconds: float,
    threads: int,
    database: Path,
) -> TuneResult:
    """Tune one network and write it with and without what was found."""
    model = load(write(name, folder, precision=precision, batch=batch))
    found = driver.tune(
        model,
        threads=threads,
        budget_s=seconds - min(AFTER_S, AFTER_SHARE * seconds),
        database=database,
        wanted=Wanted(precision=precision),
        progress=console(),
    )
    for package, records in ((TUNED, database), (UNTUNED, None)):
        driver.compile(model, threads=threads, precision=precision, database=records).save(
            folder / package
        )
    return found


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


def decisions(found: TuneResult) -> list[str]:
    """Return what the session decided, one line for each decision."""
    lines = []
    if found.lowering is not None:
        lines += [
            f"lowering  {point}: {option}" for point, option in found.lowering.decided.items()
        ]
        lines.append(
            f"lowering  {found.lowering.tried} of {found.lowering.choices} tried, the whole model "
            f"{found.lowering.speedup or 1.0:.3f} times as fast"
        )
    for kernel in sorted(found.kernels, key=lambda kernel: -(kernel.model_ms or 0.0)):
        if kernel.verdict == "confirmed" and kernel.untuned_ms and kernel.after_ms:
            gain = kernel.untuned_ms / kernel.after_ms
            lines.append(
                f"schedule  {kernel.name}: {gain:.3f}, {kernel.model_ms or 0:.3f} ms a run"
            )
    lines.append(
        f"schedule  {sum(kernel.trials for kernel in found.kernels)} tried, the whole model "
        f"{found.model_speedup or 1.0:.3f} times as fast"
    )
    return lines


def over_untuned(run: Bench) -> float:
    """Return how many times as fast tuning made the network."""
    return entry(run, UNTUNED).latency.median_ms / entry(run, TUNED).latency.median_ms


def row(name: str, runs: list[Bench]) -> str:
    """Return the row of a table in `RESULTS.md`."""
    shown = middle(runs, TUNED)
    times = [f"{entry(shown, package).latency.median_ms:.3g}" for package in (TUNED, UNTUNED)]
    gain = f"{over_untuned(shown):.2f}"
    return "| " + " | ".join([name, *times, gain, *cells(runs, TUNED)]) + " |"


HEAD = (
    "| network | tuned ms | untuned ms | over untuned | onnxruntime ms | OpenVINO ms "
    "| ratio to onnxruntime | ratio to OpenVINO | to the better |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", choices=NAMES, action="append", help="repeatable")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="tuning of each, compiling included"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runs", type=int, default=3, help="processes; the median is printed")
    parser.add_argument("--database", type=Path, default=Path(".hone", "tuning"))
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    everything = []
    if not arguments.json:
        print(HEAD, flush=True)
    for name in arguments.only or NETWORKS:
        with TemporaryDirectory(prefix="hone-tuned-") as given:
            folder = Path(given)
            found = tuned(
                name,
                folder,
                precision=arguments.precision,
                batch=arguments.batch,
                seconds=arguments.seconds,
                threads=arguments.threads,
                database=arguments.database,
            )
            for line in decisions(found):
                print(f"{name}  {line}", file=sys.stderr, flush=True)
            runs = compare(
                [folder / TUNED, folder / UNTUNED],
                threads=arguments.threads,
                rounds=arguments.rounds,
                runs=arguments.runs,
            )
        everything.append(
            {
                "network": name,
                "precision": arguments.precision,
                "batch": arguments.batch,
                "seconds": arguments.seconds,
                "threads": arguments.threads,
                "runs": [{"results": data(run), "over_untuned": over_untuned(run)} for run in runs],
                "search": search(found),
                "environment": runs[0].environment,
            }
        )
        if not arguments.json:
            print(row(f"{name} {arguments.precision}", runs), flush=True)
    if arguments.json:
        print(json.dumps({"results": everything}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
