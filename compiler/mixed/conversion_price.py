"""What a conversion between precisions takes, by those that were timed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import tvm

from hone.passes.graph.dataflow import Dataflow, shape_of
from hone.profiling.call_times import CallTime, is_conversion
from hone.profiling.conversions import conversions


def timed_conversions(module: tvm.IRModule, calls: Sequence[CallTime]) -> list[tuple[int, float]]:
    """Return elements and microseconds of each conversion that is a kernel of its own.

    Parameters
    ----------
    module : IRModule
        Quantized and not lowered.
    calls : sequence of CallTime
        Of a run.
    """
    found = conversions(module)
    elements = {
        str(binding.var.name): math.prod(shape_of(binding.var))
        for binding in Dataflow(module["main"]).bindings
        if str(binding.var.name) in found
    }
    return [
        (sum(elements[name] for name in call.names), call.us)
        for call in calls
        if is_conversion(call, found)
    ]


def conversion_us(elements: float, timed: Sequence[tuple[int, float]], *, least: float) -> float:
    """Return the price of a conversion that was not timed itself.

    What conversions took in all, for their elements in all, but not less than memory takes; that
    alone where none was timed.

    Worked number: two conversions of 1000 and 3000 elements took 2 and 4 us, 1.5 ns an element:
    500 elements are priced at 0.75 us.

    Parameters
    ----------
    elements : float
        Of the tensor.
    timed : sequence of (int, float)
        Elements and microseconds.
    least : float
        Microseconds that moving the bytes takes.
    """
    total = sum(count for count, _ in timed)
    if not total:
        return least
    return max(elements * sum(us for _, us in timed) / total, least)
