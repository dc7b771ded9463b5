"""Times a compiled kernel in samples, as it runs between its neighbours: with weights from memory.

A network that does not fit the caches finds each kernel's weights in memory (or the last cache)
and its input, which was just written, near. So a kernel runs on one copy of its weights after the
other here, as many as the network's weights take.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np
import tvm

WARM_UP_S = 0.005
"""Runs before the timing: the first ones pay for page faults and for the threads' start."""

SAMPLE_S = 0.004
CHUNK_S = 5e-5
"""One sample takes so long, in chunks of runs of about this length: 1000 times the clock's
resolution, and short beside what another process takes a core away for."""

QUIET = 0.1
"""Quantile of a sample's chunks that counts. On a busy machine a kernel on one thread beats one
whose threads wait for a processor; the chunks that nobody disturbed show what is so otherwise."""

PATIENCE_S = 0.5
"""A kernel slower than this is sampled by single runs."""

MOST_COPIES = 16
"""Of the weights; a copy more often than this in memory than its last use is far away anyway."""


def copies(weight_bytes: int, cold_bytes: int) -> int:
    """Return how many copies of a kernel's weights take as much room as the network's.

    Parameters
    ----------
    weight_bytes : int
        Of the kernel.
    cold_bytes : int
        Of all weights of the network; 0 when they stay in the caches from run to run.
    """
    if not weight_bytes or not cold_bytes:
        return 1
    return max(1, min(MOST_COPIES, -(-cold_bytes // weight_bytes)))


class Sampler:
    """Runs one kernel.

    Parameters
    ----------
    library : runtime.Module
        Holds ``main``.
    arguments : sequence of Tensor
        Its arguments.
    weights : sequence of int
        Positions of those that are weights.
    cold_bytes : int
        See `copies`.
    """

    def __init__(
        self,
        library: tvm.runtime.Module,
        arguments: Sequence[tvm.runtime.Tensor],
        *,
        weights: Sequence[int] = (),
        cold_bytes: int = 0,
    ) -> None:
        self._library = library
        self._kernel = library["main"]
        size = sum(_bytes(arguments[i]) for i in weights)
        self._sets = [list(arguments)]
        for _ in range(copies(size, cold_bytes) - 1):
            copied = list(arguments)
            for i in weights:
                copied[i] = arguments[i].copyto(tvm.cpu())
            self._sets.append(copied)
        self._once_s = PATIENCE_S
        self._next = 0

    def warm_up(self) -> float:
        """Run until the caches and the threads are warm; return the seconds of one run."""
        started = time.perf_counter()
        self._kernel(*self._sets[0])
        once = time.perf_counter() - started
        if once < WARM_UP_S:
            once = statistics.median(self._chunks(1, 5))
            for _ in range(2):
                (once,) = self._chunks(max(1, int(WARM_UP_S / once)), 1)
        elif once < PATIENCE_S:
            (once,) = self._chunks(1, 1)
        self._once_s = once
        return once

    def sample(self) -> float:
        """Return the seconds of one run, as it is in the undisturbed part of some milliseconds."""
        number = max(1, int(CHUNK_S / self._once_s))
        count = max(1, int(SAMPLE_S / (number * self._once_s)))
        return float(np.quantile(self._chunks(number, count), QUIET))

    def _chunks(self, number: int, count: int) -> list[float]:
        """Return the mean seconds of ``number`` runs in a row, ``count`` times."""
        if len(self._sets) == 1:
            evaluator = self._library.time_evaluator("main", tvm.cpu(), number=number, repeat=count)
            return [float(seconds) for seconds in evaluator(*self._sets[0]).results]
        copies, kernel = len(self._sets), self._kernel
        means = []
        for _ in range(count):
            order = [self._sets[(self._next + i) % copies] for i in range(number)]
            started = time.perf_counter()
            for arguments in order:
                kernel(*arguments)
            means.append((time.perf_counter() - started) / number)
            self._next = (self._next + number) % copies
        return means


def _bytes(tensor: tvm.runtime.Tensor) -> int:
    itemsize: int = tvm.runtime.DataType(str(tensor.dtype)).itemsize
    return int(np.prod([int(extent) for extent in tensor.shape])) * itemsize
