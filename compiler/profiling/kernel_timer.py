"""Times every kernel inside the running model, without the compiler.

The virtual machine calls an instrument before and after each call that it makes. Two are used: one
in Python that sees names and arguments, once, and one that only reads the clock, called from C
without converting any argument, so that a kernel of a microsecond can still be timed.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hone.errors import UsageError
from hone.runtime import Runner

BUILTIN = "vm.builtin."
"""What the names of the virtual machine's own routines begin with."""

ROUNDS = 8
MIN_RUNS = 3
MAX_RUNS = 200
# TVMFFISafeCallType of tvm/ffi/c_api.h: handle, arguments, their number, result.
_SAFE_CALL = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p
)


@dataclass(frozen=True, kw_only=True)
class Operand:
    """A tensor that a kernel reads or writes.

    Parameters
    ----------
    dtype : str
        Of its elements.
    size_bytes : int
        Of all of them.
    address : int
        Where it begins.
    weight : bool
        Whether it is a constant of the package.
    """

    dtype: str
    size_bytes: int
    address: int
    weight: bool


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call that the virtual machine makes in a run.

    Parameters
    ----------
    name : str
        Of the function.
    operands : tuple of Operand
        Its tensors, in the order of the arguments; the results come last.
    """

    name: str
    operands: tuple[Operand, ...]

    @property
    def is_kernel(self) -> bool:
        """Whether it computes something of the model."""
        return not self.name.startswith(BUILTIN)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What the virtual machine does in one run; the same in every run.

    Parameters
    ----------
    calls : tuple of Call
        In order.
    storage_bytes : int
        Of the storage that activations share, as planned at compile time.
    """

    calls: tuple[Call, ...]
    storage_bytes: int


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of the calls of a run.

    Parameters
    ----------
    call_s : ndarray
        ``[runs, calls]`` seconds of each call, less `timer_s`. The virtual machine runs the slices
        of a batch one after the other: divided by how many a run makes at once.
    run_s : ndarray
        ``[rounds]`` seconds of a run that nobody watched, the median of each round.
    watched_rounds : ndarray
        ``[runs]`` round of each watched run.
    timer_s : float
        What watching adds to a call: the time of the cheapest call.
    """

    call_s: np.ndarray
    run_s: np.ndarray
    watched_rounds: np.ndarray
    timer_s: float


def trace(runner: Runner, inputs: Mapping[str, np.ndarray]) -> Trace:
    """Run once and note every call.

    Parameters
    ----------
    runner : Runner
        The package.
    inputs : mapping of str to ndarray
        Of the signature.

    Returns
    -------
    Trace

    Raises
    ------
    UsageError
        The model calls functions of its own, so that one call's time would hold another's.
    """
    run = runner.prepare(inputs)
    run()
    depths: list[int] = [0]
    calls: list[Call] = []
    storage: list[int] = []
    activations: set[int] = set()

    def instrument(_: Any, name: str, before: bool, result: Any, *arguments: Any) -> None:
        tensors = [a for a in arguments if hasattr(a, "__dlpack__")]
        if name.startswith(BUILTIN):
            # Inputs are checked by a builtin, storage becomes tensors by one: whatever a builtin
            # has never seen is a constant.
            activations.update(t.data_ptr() for t in tensors)
            if hasattr(result, "__dlpack__"):
                activations.add(result.data_ptr())
            if before and name.endswith(".alloc_storage"):
                storage.append(int(np.prod(tuple(arguments[1]), dtype=np.int64)))
        depths.append(depths[-1] + (1 if before else -1))
        if before:
            operands = tuple(_operand(t, weight=t.data_ptr() not in activations) for t in tensors)
            calls.append(Call(name=name, operands=operands))

    with runner.instrumented(instrument):
        run()
    if max(depths) > 1:
        raise UsageError(
            "only a model whose kernels are called one after the other can be profiled; "
            "this one calls functions of its own"
        )
    # Every slice of a batch allocates again, and those that run at once do so side by side.
    storage_bytes = sum(storage) // runner.slices * runner.abreast
    return Trace(calls=tuple(calls), storage_bytes=storage_bytes)


def _operand(tensor: Any, *, weight: bool) -> Operand:
    elements = int(np.prod(tuple(tensor.shape), dtype=np.int64))
    return Operand(
        dtype=str(tensor.dtype),
        size_bytes=elements * tensor.dtype.itemsize,
        address=tensor.data_ptr(),
        weight=weight,
    )


def clock_reader(ticks: list[int]) -> Any:
    """Return an instrument that appends the nanoseconds at which it is called."""
    import tvm_ffi

    clock, note = time.perf_counter_ns, ticks.append

    def tick(_handle: Any, _arguments: Any, _count: int, _result: Any) -> int:
        note(clock())
        return 0

    callback = _SAFE_CALL(tick)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    return tvm_ffi.Function.__from_extern_c__(address, keep_alive_object=callback)


def time_calls(
    runner: Runner,
    inputs: Mapping[str, np.ndarray],
    traced: Trace,
    *,
    seconds: float,
    on_round: Callable[[int], None] | None = None,
) -> Timing:
    """Time every call in turns with runs that nobody watches.

    Parameters
    ----------
    runner : Runner
        The package.
    inputs : mapping of str to ndarray
        Those of the trace.
    traced : Trace
        What to expect.
    seconds : float
        About how long to go on; a slow model gets a few runs anyway.
    on_round : callable, optional
        Called with the number of rounds done, of `ROUNDS`.

    Returns
    -------
    Timing

    Raises
    ------
    UsageError
        The model does not make the same calls in every run.
    """
    run = runner.prepare(inputs)
    clock = time.perf_counter_ns
    ticks: list[int] = []
    watched, rounds, plain = [], [], []
    started = clock()
    run()
    runs = int(seconds / (2 * ROUNDS) / ((clock() - started) * 1e-9))
    runs = min(max(runs, MIN_RUNS), MAX_RUNS)
    warmup = 1 + runs // 8
    instrument = clock_reader(ticks)
    for number in range(ROUNDS):
        samples = []
        for _ in range(warmup + runs):
            started = clock()
            run()
            samples.append(clock() - started)
        plain.append(np.median(samples[warmup:]))
        with runner.instrumented(instrument):
            for index in range(warmup + runs):
                ticks.clear()
                run()
                if index >= warmup:
                    watched.append(tuple(ticks))
                    rounds.append(number)
        if on_round is not None:
            on_round(number + 1)
    if any(len(row) != 2 * len(traced.calls) for row in watched):
        raise UsageError(
            "only a model that makes the same calls in every run can be profiled; this one branches"
        )
    intervals = np.diff(np.array(watched, np.int64).reshape(len(watched), -1), axis=1) * 1e-9
    timer = float(np.median(intervals, axis=0).min())
    return Timing(
        call_s=np.maximum(intervals[:, ::2] - timer, 0.0) / runner.abreast,
        run_s=np.array(plain) * 1e-9,
        watched_rounds=np.array(rounds),
        timer_s=timer,
    )
