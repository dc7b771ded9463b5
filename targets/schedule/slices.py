"""In how many parts a batch is run, one thread each: the samples of a slice pass all layers first.

A batch as a whole writes a layer's tensors for all samples before the next layer reads them: they
leave a core's cache, and threads meet at every kernel. A thread that takes a slice of few samples
through the network finds them where it left them; but it reads all weights for each slice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .machine import (
    FMA_PER_CYCLE,
    L2_BYTES_PER_CYCLE,
    L3_BYTES_PER_CYCLE,
    MOST_OPTIONS,
    WEIGHT_BYTES_PER_CYCLE,
    Machine,
    divisors,
)

WHOLE = "whole"
"""The option that shares every kernel among the threads."""

# Of the time of all products: how long a thread waits for the other one at the ends of kernels
# (0.26 of 14.9 ms, ResNet-50, docs/performance.md), and what kernels in parallel parts cost beside
# that. Starting a kernel on all threads takes about a microsecond, here in cycles.
IDLE_SHARE = 0.02
START_CYCLES = 4000
# The share of the last cache that one model may count on: others use it as well.
L3_SHARE = 2
# Bytes per cycle that all cores together move to and from memory (52 GB/s at 4 GHz).
MEMORY_BYTES_PER_CYCLE = 13


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """What one layer does for one sample.

    Parameters
    ----------
    products : int
        Multiply-adds.
    activation_bytes : int
        That it reads and writes.
    weight_bytes : int
        Of its constants, which all samples share.
    """

    products: int
    activation_bytes: int
    weight_bytes: int


def choose_slice(machine: Machine, *, batch: int, layers: Sequence[LayerLoad]) -> int:
    """Choose how many samples of a batch a thread takes through the network at once.

    Parameters
    ----------
    machine : Machine
        Its threads take slices side by side.
    batch : int
        Samples of a run.
    layers : sequence of LayerLoad
        Of the network, in order.

    Returns
    -------
    int
        A divisor of the batch; 0 where all threads share every kernel of the whole batch, as they
        do where there are fewer samples than threads.
    """
    options = {WHOLE: 0}
    if batch > 1 and batch >= machine.threads:
        fitting = [n for n in divisors(batch) if n * machine.threads <= batch]
        options |= {str(images): images for images in fitting}
    costs = {
        name: _cycles(machine, batch=batch, images=images, layers=layers)
        for name, images in options.items()
    }
    ranked = sorted(options, key=lambda name: (costs[name], options[name]))[:MOST_OPTIONS]
    return machine.pick(point(batch, layers), {name: options[name] for name in ranked})


def point(batch: int, layers: Sequence[LayerLoad]) -> str:
    """Return the name of the choice for one network, such as ``slices of 32, 1f2e3d4c5b6a``."""
    digest = hashlib.sha256(repr(tuple(layers)).encode()).hexdigest()
    return f"slices of {batch}, {digest[:12]}"


def _cycles(machine: Machine, *, batch: int, images: int, layers: Sequence[LayerLoad]) -> float:
    """Model one run of the batch.

    With 2 threads and 8 samples in slices of 2, each thread runs 2 slices one after the other:
    2 times the products, the weights and what the tensors of 2 samples take from their cache.
    """
    threads = machine.threads
    weights = sum(layer.weight_bytes for layer in layers)
    products = sum(layer.products for layer in layers) / (machine.lanes * FMA_PER_CYCLE)
    apart = images > 0
    share = images if apart else batch / threads
    moved = sum(_moved(machine, share * layer.activation_bytes) for layer in layers)
    if apart:
        runs = -(-(batch // images) // threads)
        return runs * (share * products + weights / _weight_rate(machine, weights) + moved)
    streams = weights / _weight_rate(machine, weights) / threads
    return share * products * (1 + IDLE_SHARE) + streams + moved + len(layers) * START_CYCLES


def _moved(machine: Machine, size_bytes: float) -> float:
    """Return the cycles that one core waits for the tensors of a layer."""
    if size_bytes <= machine.l2_bytes:
        return 0.0
    if machine.threads * size_bytes <= machine.l3_bytes // L3_SHARE:
        return size_bytes / L3_BYTES_PER_CYCLE
    return size_bytes * machine.threads / MEMORY_BYTES_PER_CYCLE


def _weight_rate(machine: Machine, weights_bytes: int) -> float:
    """Return the bytes of weights per cycle that one core reads while the others read as well."""
    holding = replace(machine, l3_holds=False).holding(weights_bytes)
    if holding.l3_holds:
        return L3_BYTES_PER_CYCLE
    if weights_bytes <= machine.l2_bytes // 2:
        return L2_BYTES_PER_CYCLE
    return WEIGHT_BYTES_PER_CYCLE / machine.threads
