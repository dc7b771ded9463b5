"""What each call of a kernel takes inside the running model, and which layers pay for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tvm

from hone.importing.layer_names import layer_binding
from hone.passes.lower.fuse_operators import call_layers
from hone.runtime import Runner

from .kernel_timer import time_calls, trace


@dataclass(frozen=True, kw_only=True)
class CallTime:
    """One call of a kernel.

    Parameters
    ----------
    kernel : str
        Its name.
    names : tuple of str
        Bindings that it computes; none for what the compiler added.
    us : float
        Median over runs, in microseconds.
    """

    kernel: str
    names: tuple[str, ...]
    us: float


def call_times(
    runner: Runner,
    inputs: Mapping[str, np.ndarray],
    lowered: tvm.IRModule,
    *,
    seconds: float,
    on_round: Callable[[int], None] | None = None,
) -> tuple[CallTime, ...]:
    """Time every call of a run, in order.

    Parameters
    ----------
    runner : Runner
        A package.
    inputs : mapping of str to ndarray
        Of its signature.
    lowered : IRModule
        From which the package was made: it knows what each call computes.
    seconds : float
        About how long to measure.
    on_round : callable, optional
        As for `hone.profiling.kernel_timer.time_calls`.

    Raises
    ------
    UsageError
        The model branches or calls functions of its own.
    """
    traced = trace(runner, inputs)
    timing = time_calls(runner, inputs, traced, seconds=seconds, on_round=on_round)
    table = call_layers(lowered)
    done: Counter[str] = Counter()
    found = []
    for index, call in enumerate(traced.calls):
        if not call.is_kernel:
            continue
        known = table.get(call.name, ())
        known = known[done[call.name] % len(known) :][:1] if known else ()  # again in each slice
        done[call.name] += 1
        us = float(np.median(timing.call_s[:, index])) * 1e6
        found.append(CallTime(kernel=call.name, names=known[0] if known else (), us=us))
    return tuple(found)


def layer_us(
    calls: Sequence[CallTime], layers: Collection[str], conversions: Collection[str]
) -> dict[str, float]:
    """Return the microseconds of layers: their kernels, and what follows until the next one.

    A kernel of several layers is shared out evenly. What only converts is nobody's: it depends on
    the layer's neighbours. What comes before the first layer is nobody's either.

    Parameters
    ----------
    calls : sequence of CallTime
        Of one run.
    layers : collection of str
        Binding names of the layers to be told apart.
    conversions : collection of str
        Names of the bindings that convert.
    """
    found: dict[str, float] = {}
    last: list[str] = []
    for call in calls:
        if is_conversion(call, conversions):
            continue
        own = list(dict.fromkeys(layer_binding(name) for name in call.names))
        last = [name for name in own if name in layers] or last
        for name in last:
            found[name] = found.get(name, 0.0) + call.us / len(last)
    return found


def is_conversion(call: CallTime, conversions: Collection[str]) -> bool:
    """Say whether a call does nothing but convert."""
    return bool(call.names) and all(name in conversions for name in call.names)
