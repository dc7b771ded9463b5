"""Which weights each kernel of a plan requests for a later one while it computes.

A kernel of fewer products than its weights take time from memory waits for them, while memory
rests during the kernels before it, which read little. Those request its weights, so that they lie
in the cache that the cores share when their turn comes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import tvm

from hone.passes.lower.request_ahead import Turns
from hone.targets.schedule.blocks import LINE_BYTES
from hone.targets.schedule.machine import FMA_PER_CYCLE, Machine

from .plan import KernelCall, Place, Plan, Region

# Bytes per cycle that memory gives two cores which share a way to it (38 to 47 GB/s at 4 GHz,
# docs/performance.md).
MEMORY_BYTES_PER_CYCLE = 10
# The most that kernels before may fill up, their own weights included.
REQUESTED_BYTES_PER_CYCLE = 12
# Kernels that request for one: those right before it.
MOST_HOSTS = 2
# Constants below this are no weights worth a request.
LEAST_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """What a call requests: a part of a constant.

    Parameters
    ----------
    place : Place
        Where it begins.
    step_bytes : int
        From what one turn requests to what the next one does.
    """

    place: Place
    step_bytes: int


def requests_ahead(plan: Plan, turns: Mapping[str, Turns], machine: Machine) -> dict[int, Ahead]:
    """Return for calls of a plan, by their number, what they request.

    Worked number: 14x14, 256 to 256 channels by F(4x4), two threads of 16 lanes: 9.4 MB of weights
    take 940 000 cycles from memory, its products 590 000, so that it waits. The layer of 256 to
    1024 channels before it takes 800 000 cycles and reads 1 MB: beside that memory could give it
    8.6 MB, and 114 688 turns request 7.3 MB.

    Parameters
    ----------
    plan : Plan
        A run.
    turns : mapping of str to Turns
        Of the kernels that can request.
    machine : Machine
        Threads and caches.

    Returns
    -------
    dict of int to Ahead
        Empty where the last cache holds all weights, or where no threads share a kernel.
    """
    sizes = [_bytes(constant) for constant in plan.constants]
    if machine.threads == 1 or plan.slices > 1 or sum(sizes) <= machine.l3_bytes // 2:
        return {}
    weights = [_weights(call, sizes) for call in plan.calls]
    own = [sum(sizes[index] for index in each) for each in weights]
    per_cycle = machine.lanes * FMA_PER_CYCLE * machine.threads
    cycles = [
        found.number * found.operations / per_cycle
        if (found := turns.get(call.kernel)) is not None
        else 0.0
        for call in plan.calls
    ]
    waits = [
        len(each) == 1 and size >= machine.l2_bytes and size > MEMORY_BYTES_PER_CYCLE * time
        for each, size, time in zip(weights, own, cycles, strict=True)
    ]
    chosen: dict[int, Ahead] = {}
    for target in (number for number, waiting in enumerate(waits) if waiting):
        hosts: list[tuple[int, int]] = []
        missing = own[target]
        for before in range(target - 1, max(target - 1 - MOST_HOSTS, -1), -1):
            found = turns.get(plan.calls[before].kernel)
            busy = waits[before] or own[before] > machine.l2_bytes
            if busy or found is None or not _is_quiet(found, machine):
                continue
            room = int(cycles[before] * REQUESTED_BYTES_PER_CYCLE) - own[before]
            part = min(room, missing, found.number * LINE_BYTES)
            if before not in chosen and part >= machine.l2_bytes // 4:
                hosts.append((before, part))
                missing -= part
        at = 0
        for before, part in reversed(hosts):
            number = turns[plan.calls[before].kernel].number
            step = math.ceil(part / number)
            place = Place(region=Region.CONSTANT, index=weights[target][0], offset_bytes=at)
            chosen[before] = Ahead(place=place, step_bytes=step)
            at += step * number // LINE_BYTES * LINE_BYTES
    return chosen


def _is_quiet(turns: Turns, machine: Machine) -> bool:
    """Say whether what a register tile reads of the data stays in the first level.

    Requests go through the second level, and what a kernel reads from there becomes slow: 17% for
    1024 to 256 channels at 14x14, 8% for 256 to 1024 of as many lines.
    """
    return turns.operations // machine.lanes * turns.steps * 4 <= machine.l1_bytes


def _bytes(constant: tvm.ir.GenericConst) -> int:
    shape = [int(extent) for extent in constant.ty.shape.values]
    return math.prod(shape) * int(tvm.runtime.DataType(str(constant.ty.dtype)).itemsize)


def _weights(call: KernelCall, sizes: list[int]) -> list[int]:
    """Return the large constants of a call."""
    return [
        place.index
        for place in call.places
        if place.region is Region.CONSTANT and sizes[place.index] >= LEAST_BYTES
    ]
