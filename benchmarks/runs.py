"""Several runs of one comparison, each in a process of its own, and the rows they make."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import median_low
from typing import Any

from networks import PEERS

from hone.bench import Bench, Result, bench
from hone.measure import Rounds


def compare(packages: Sequence[Path], *, threads: int, rounds: int, runs: int) -> list[Bench]:
    """Measure packages beside every peer that is installed, so many times.

    One process loads a package at one place in memory, which alone moves a kernel by several
    percent: only several processes show it.
    """
    installed = [peer for peer in PEERS if find_spec(peer)]
    found = []
    for _ in range(runs):
        # A new process for each run: no worker is used twice.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as worker:
            run = worker.submit(
                bench, list(packages), vs=installed, threads=threads, rounds=Rounds(rounds=rounds)
            )
            found.append(run.result())
    return found


def entry(run: Bench, name: str) -> Result:
    """Return the contender of a name."""
    return next(found for found in run.results if found.name == name)


def to_the_better(run: Bench, name: str) -> float:
    """Return the ratio of a contender to the fastest of the peers; infinite without peers."""
    ratios = entry(run, name).ratio.values()
    return min((speedup.ratio for speedup in ratios), default=float("inf"))


def middle(runs: Sequence[Bench], name: str) -> Bench:
    """Return the run with the median ratio to the better peer (the lower one of an even number)."""
    ratios = [to_the_better(run, name) for run in runs]
    return runs[ratios.index(median_low(ratios))]


def cells(runs: Sequence[Bench], name: str) -> list[str]:
    """Return the last cells of a row of `RESULTS.md`: times of the peers, ratios to them.

    A ratio is the median of the runs with each of them behind it, as ``1.22 (1.22, 1.21, 1.24)``;
    the last cell is the median ratio to the better peer.
    """
    shown = middle(runs, name)
    measured = {found.name: f"{found.latency.median_ms:.3g}" for found in shown.results}
    ratios = []
    for peer in PEERS:
        if peer not in measured:
            ratios.append("-")
            continue
        each = [entry(run, name).ratio[peer].ratio for run in runs]
        every = ", ".join(f"{ratio:.2f}" for ratio in each)
        ratios.append(f"{median_low(each):.2f} ({every})")
    times = [measured.get(peer, "-") for peer in PEERS]
    return [*times, *ratios, f"**{to_the_better(shown, name):.2f}**"]


def data(run: Bench) -> list[dict[str, Any]]:
    """Return what one run measured, a contender each, as JSON data."""
    return [
        {
            "name": found.name,
            "precision": found.precision,
            "latency_ms": {
                "median": found.latency.median_ms,
                "p90": found.latency.p90_ms,
                "ci95": found.latency.ci95_ms,
                "samples": found.latency.samples,
            },
            "ratio": {
                peer: {"ratio": speedup.ratio, "ci95": speedup.ci95}
                for peer, speedup in found.ratio.items()
            },
        }
        for found in run.results
    ]
