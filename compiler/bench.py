"""``hone bench``: packages, models and other engines in one interleaved run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from . import driver, environment, importer, parity, runtime
from .errors import ModelError, UsageError
from .importing import onnx_file
from .measure import Contender, InProcess, Latency, Rounds, Speedup, measure
from .model import Model
from .package import Package
from .peers import Peer, peer_precision
from .progress import Progress, silent
from .rounding import is_quantized

# Folders that are looked through for the model of a package: a project, not a whole disk.
MOST_FOLDERS = 1000


@dataclass(frozen=True, kw_only=True)
class Result:
    """One contender.

    Parameters
    ----------
    name : str
        The package's or model's file name, or the peer's name.
    precision : str
        Such as ``fp32``.
    latency : Latency
        Of one run.
    ratio : dict of str to Speedup
        How many times faster than each peer; empty for a peer.
    """

    name: str
    precision: str
    latency: Latency
    ratio: dict[str, Speedup]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A whole run.

    Parameters
    ----------
    results : tuple of Result
        In the order given, then the peers.
    threads : int
        Threads of one run.
    environment : dict
        Fingerprint of the machine.
    """

    results: tuple[Result, ...]
    threads: int
    environment: dict[str, object]


def _is_package(path: Path) -> bool:
    return path.suffix == ".hone"


def bench(
    items: Sequence[str | Path],
    *,
    vs: Sequence[str] = (),
    threads: int = 2,
    rounds: Rounds | None = None,
    shapes: dict[str, tuple[int, ...]] | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Compare packages and models with one another and with other engines.

    Parameters
    ----------
    items : sequence of str or Path
        Packages (``.hone``) and ONNX models; a model is compiled first, without tuning. All must
        have the same inputs.
    vs : sequence of str
        Peers. They run the ONNX model among the items, or the one that a package was made of,
        which is looked for beside the package and below the current folder by its hash; in 16-bit
        floats where a package is, as far as they can.
    threads : int
        Threads of one run, for everybody; at most as many as there are processors.
    rounds : Rounds, optional
        How often to run; more often where it takes more to compare with a peer.
    shapes : dict, optional
        Static shapes of a model's inputs.
    progress : Progress, optional
        Where to report.

    Raises
    ------
    UsageError
        Nothing to compare, different inputs, or a peer without an ONNX model (exit 2).
    """
    progress = progress or silent()
    if not items:
        raise UsageError("nothing to measure", hint="name a package or an ONNX model")
    if threads > (usable := len(os.sched_getaffinity(0))):
        # A package is given no more, and a peer with more would measure its own overhead.
        progress.log(f"{threads} threads are wanted, there are {usable} processors: {usable} run")
        threads = usable
    runners: dict[str, runtime.Runner] = {}
    inputs: dict[str, np.ndarray] | None = None
    source: Model | None = None
    for path in map(Path, items):
        if _is_package(path):
            package = Package.read(path)
            if inputs is None and (samples := package.golden()):
                inputs = dict(samples[0].inputs)
            if vs and source is None:
                source = _model_of(package, near=path)
        else:
            source = importer.load(path, shapes)
            package = driver.compile(source, threads=threads, progress=progress)
            inputs = parity.random_inputs(source, seed=0)
        runners[_unique(path.name, runners)] = runtime.load(package, threads=threads)
    _require_same_inputs(runners)
    if inputs is None:
        raise UsageError(f"{items[0]} holds no golden inputs to run", hint="add its ONNX model")
    contenders: dict[str, Contender] = {
        name: InProcess(runner.prepare(inputs)) for name, runner in runners.items()
    }
    precisions: dict[str, str] = {
        name: runner.manifest.precision for name, runner in runners.items()
    }
    floats = peer_precision(*precisions.values())
    plan = rounds or Rounds()
    with ExitStack() as stack:
        for name in vs:
            if source is None or source.source is None:
                raise UsageError(
                    f"{name} runs ONNX, and none was given",
                    hint=f"hone bench {items[0]} MODEL.onnx --vs {','.join(vs)}, "
                    "or put the model that the package was made of beside it",
                )
            peer = stack.enter_context(
                Peer(name, source.source, inputs, threads=threads, precision=floats)
            )
            contenders[name] = peer
            # What it was asked for is the precision of its float layers.
            quantized = is_quantized(source.source)
            precisions[name] = "int8" if quantized else peer.info.precision
        task = stack.enter_context(progress.task("measure", total=plan.most))
        compared = [(name, peer) for name in runners for peer in vs]
        measured = measure(contenders, plan, settle=compared, on_round=task.update)
    results = tuple(
        Result(
            name=name,
            precision=precisions[name],
            latency=measured.latency(name),
            ratio={} if name in vs else {p: measured.speedup(name, over=p) for p in vs},
        )
        for name in contenders
    )
    return Bench(
        results=results, threads=threads, environment=dict(environment.fingerprint(threads))
    )


def _model_of(package: Package, *, near: Path) -> Model | None:
    """Return the model that a package was made of, if it lies here: its hash decides."""
    wanted = package.manifest.provenance.source_sha256
    shapes = {t.name: t.shape for t in package.signature.inputs}
    for path in _onnx_files(near):
        try:
            found = onnx_file.read(path).sha256 == wanted
        except (ModelError, UsageError):
            continue  # whatever it is, it is not the model that the package was made of
        if found:
            return importer.load(path, shapes)
    return None


def _onnx_files(near: Path) -> Iterator[Path]:
    """Yield the ONNX files beside a package, then those in and below the current folder."""
    yield from sorted(near.absolute().parent.glob("*.onnx"))
    for folder, below, names in islice(os.walk(Path.cwd()), MOST_FOLDERS):
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".onnx"))


def _unique(name: str, taken: dict[str, runtime.Runner]) -> str:
    number, unique = 2, name
    while unique in taken:
        unique, number = f"{name} ({number})", number + 1
    return unique


def _require_same_inputs(runners: dict[str, runtime.Runner]) -> None:
    (first, runner), *others = runners.items()
    for name, other in others:
        if other.signature.inputs != runner.signature.inputs:
            raise UsageError(
                f"{first} and {name} take different inputs and cannot be compared: "
                f"{', '.join(map(str, runner.signature.inputs))} and "
                f"{', '.join(map(str, other.signature.inputs))}"
            )
