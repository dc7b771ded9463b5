"""Builds and times one candidate kernel in a process of its own, forked from a warm server.

The server (``multiprocessing``'s fork server) imports TVM once and never starts a thread; each
candidate is a fork of it, so a build that crashes, hangs or eats the memory loses that candidate
only, and no worker ever imports ``tvm.s_tir.tensor_intrin`` (20 to 30 s). A candidate compiles to
memory and is timed where it was compiled: no linker, no file. Machine code and times are those of
a linked library (measured: within 2%).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from hone.passes.lower.promote_accumulators import CODEGEN_CONFIG, TIR_PIPELINE
from hone.targets import features

from .pinning import pin_all
from .reason import reason_of
from .replay import plain
from .sampling import Sampler

TOLERANCE = 1e-3
"""Largest difference from the untuned kernel, relative to its largest value: a sum in another
order stays orders of magnitude below, a wrong index does not."""

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """One candidate to build and time.

    Parameters
    ----------
    module : str
        JSON of the scheduled module, whose function is ``main``.
    target : str
        JSON of the TVM target.
    arguments : tuple of (str, tuple of int)
        Data type and shape of each argument.
    reference : str or None
        ``.npz`` file with the arguments after a correct run.
    save_reference : bool
        Write that file instead of comparing with it.
    weights : tuple of int
        Positions of the arguments that are weights.
    cold_bytes : int
        Of all weights of the network, see `hone.tuning.sampling.copies`.
    """

    module: str
    target: str
    arguments: tuple[tuple[str, tuple[int, ...]], ...]
    reference: str | None
    save_reference: bool = False
    weights: tuple[int, ...] = ()
    cold_bytes: int = 0


class WrongResultError(Exception):
    """A candidate computes something else than the untuned kernel."""


def die_with_parent() -> None:
    """Make the kernel kill this process when the one that started it dies (Linux only)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def build(module: tvm.IRModule, target: tvm.target.Target) -> tvm.runtime.Module:
    """Compile one scheduled kernel exactly as the package's kernels are compiled.

    Parameters
    ----------
    module : IRModule
        Scheduled.
    target : Target
        What to generate code for.

    Returns
    -------
    runtime.Module
        Machine code in memory.
    """
    with tvm.transform.PassContext(opt_level=3, config=CODEGEN_CONFIG):
        return tvm.tirx.build(plain(module), target, pipeline=TIR_PIPELINE)


def make_arguments(
    arguments: Sequence[tuple[str, tuple[int, ...]]],
) -> list[tvm.runtime.Tensor]:
    """Return arguments of a kernel, the same ones in every process.

    Parameters
    ----------
    arguments : sequence of (str, tuple of int)
        Data type and shape of each.

    Returns
    -------
    list of Tensor
        Floats in [0.05, 1): no subnormal numbers, which would be timed instead of the kernel.
        Integers of 32 bits and more are 0: they may be indices.
    """
    tensors = []
    for position, (dtype, shape) in enumerate(arguments):
        generator = np.random.default_rng(position)
        if dtype in ("int8", "uint8"):
            values: Any = generator.integers(0, 100, shape, dtype=dtype)
        elif dtype.startswith(("int", "uint", "bool")):
            values = np.zeros(shape, dtype)
        else:
            values = generator.random(shape, dtype=np.float32) * np.float32(0.95)
            values += np.float32(0.05)
            values = values.astype(numpy_dtype(dtype))
        tensors.append(tvm.runtime.tensor(np.asarray(values)))
    return tensors


def numpy_dtype(dtype: str) -> Any:
    """Return NumPy's type of a name of TVM's, bfloat16 and its kin included."""
    if dtype.startswith(("int", "uint", "bool")) or dtype[5:].isdigit():
        return np.dtype(dtype)
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, dtype))


def compare(expected: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> None:
    """Check a candidate's arguments after its run.

    Parameters
    ----------
    expected, actual : sequence of array
        All arguments: what a kernel must not write counts too.

    Raises
    ------
    WrongResultError
        If one differs by more than rounding: `TOLERANCE` of the largest value for floats, 1 for
        integers (a requantization may round the other way).
    """
    for position, (want, got) in enumerate(zip(expected, actual, strict=True)):
        floating = want.dtype.kind not in "iub"
        wanted, given = want.astype(np.float64), got.astype(np.float64)
        if not np.array_equal(np.isfinite(wanted), np.isfinite(given)):
            raise WrongResultError(f"argument {position} is not finite where it should be")
        finite = np.isfinite(wanted)
        difference = np.abs(wanted - given, where=finite, out=np.zeros_like(wanted))
        largest = np.max(np.abs(wanted), where=finite, initial=0.0)
        limit = TOLERANCE * largest if floating else 1.0
        if difference.size and difference.max() > limit:
            raise WrongResultError(
                f"argument {position} differs by {difference.max():.3g} (limit {limit:.3g})"
            )


def run_candidate(connection: Connection, job: Job) -> None:
    """Body of a candidate's process: build, say so, warm up, and give samples on demand.

    Parameters
    ----------
    connection : Connection
        Sends ``("built", None)``; for the first thing received ``("warm", seconds)``, and for each
        further one ``("sample", seconds)``; at any point ``("failed", reason)``, which ends it.
    job : Job
        What to do.
    """
    die_with_parent()
    features.request_tiles()
    with suppress(OSError):  # not allowed in some containers
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        target = tvm.target.Target(json.loads(job.target))
        library = build(tvm.ir.load_json(job.module), target)
        library["main"]  # compiles to memory
        connection.send(("built", None))
        connection.recv()
        arguments = make_arguments(job.arguments)
        sampler = Sampler(library, arguments, weights=job.weights, cold_bytes=job.cold_bytes)
        sampler.warm_up()
        pin_all()  # the first run started the threads
        once_s = sampler.warm_up()
        _check(job, arguments)
        connection.send(("warm", once_s))
        while True:
            connection.recv()
            connection.send(("sample", sampler.sample()))
    except EOFError:  # the search is gone, or has enough samples
        os._exit(0)
    except Exception as error:  # noqa: BLE001 - a process boundary: the search reports it
        connection.send(("failed", reason_of(error)))


def _check(job: Job, arguments: Sequence[tvm.runtime.Tensor]) -> None:
    """Compare the arguments after a run with the right ones, or keep them as such.

    There are none where the untuned kernel did not run; the search says so.
    """
    results = [_as_plain(argument) for argument in arguments]
    if job.reference is not None and job.save_reference:
        np.savez(job.reference, *results)
    elif job.reference is not None and Path(job.reference).exists():
        with np.load(job.reference) as stored:
            compare([stored[name] for name in stored.files], results)


def _as_plain(tensor: tvm.runtime.Tensor) -> np.ndarray:
    """Return a copy that ``numpy.savez`` can store: float32 for types that NumPy lacks."""
    values: np.ndarray = tensor.numpy()
    return values.astype(np.float32) if values.dtype.kind == "V" else values
