"""What a schedule needs to know of a processor, and how it cuts work into tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from hone.targets.half_dot import HalfDot, half_dot_of
from hone.targets.integer_dot import IntegerDot, integer_dot_of
from hone.targets.target import Target

# Registers that a kernel needs beside its accumulators: a weight vector, a broadcast input,
# and two that LLVM keeps for addresses and spills of unrolled bodies (measured on AVX-512).
RESERVED_REGISTERS = 4
# Cycles of one fused multiply-add; two issue in each cycle (Intel and AMD optimization manuals).
FMA_LATENCY = 4
FMA_PER_CYCLE = 2
# Sustained bytes per cycle from L2 into registers on the cores measured so far.
L2_BYTES_PER_CYCLE = 24
# Bytes per cycle that all cores together stream from behind their own caches: weights that a
# network uses once per run come from there. With 20 the model ranks the layers of ResNet-18 as
# they measure inside the network, weights requested ahead (docs/performance.md).
WEIGHT_BYTES_PER_CYCLE = 20
# Sustained bytes per cycle that one core reads from the last cache (240 GB/s of two at 4 GHz).
L3_BYTES_PER_CYCLE = 29
# Register tiles and partitions that tuning may take: what the model ranks further behind was never
# the best one on the machines measured so far.
MOST_OPTIONS = 8
# What a byte of the input costs more than one of the weights where all threads read all of it:
# weights lie in the shared cache, the input in that of the core which computed it.
INPUT_BYTE_COST = 4
UNROLLED_STEPS = (1, 2, 4)

Option = TypeVar("Option")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The numbers of a target that schedules depend on.

    Parameters
    ----------
    lanes : int
        float32 elements of one vector.
    accumulators : int
        Vector registers that may hold partial sums.
    l1_bytes, l2_bytes : int
        Cache of one core.
    threads : int
        Threads that share a kernel.
    integer_dot : IntegerDot or None
        The instruction that sums products of bytes.
    half_dot : HalfDot or None
        The instruction that sums pairs of bfloat16 products.
    l3_bytes : int
        Cache that the cores share.
    weight_bytes_per_cycle : int
        At which all threads together stream weights that a run uses once, see `holding`.
    l3_holds : bool
        Whether the weights of the model stay in the last cache from one run to the next.
    separate_adders : bool
        Whether vectors are added on units of their own, beside as many that multiply and add.
    decided : tuple of (str, str)
        Choices that were measured: the option to take at a point, see `pick`.
    asked : dict, optional
        Notes the names of the options at every point, for tuning.
    """

    lanes: int
    accumulators: int
    l1_bytes: int
    l2_bytes: int
    threads: int
    integer_dot: IntegerDot | None = None
    half_dot: HalfDot | None = None
    l3_bytes: int = 0
    weight_bytes_per_cycle: int = WEIGHT_BYTES_PER_CYCLE
    l3_holds: bool = False
    separate_adders: bool = False
    decided: tuple[tuple[str, str], ...] = ()
    asked: dict[str, tuple[str, ...]] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, target: Target, threads: int) -> Machine:
        """Return the machine that a target's table describes."""
        return cls(
            lanes=max(target.vector_bits // 32, 1),
            accumulators=max(target.vector_registers - RESERVED_REGISTERS, 4),
            l1_bytes=target.l1d_bytes,
            l2_bytes=target.l2_bytes,
            l3_bytes=target.l3_bytes,
            threads=threads,
            integer_dot=integer_dot_of(target),
            half_dot=half_dot_of(target),
            separate_adders=target.separate_adders,
        )

    def holding(self, weights_bytes: int) -> Machine:
        """Return the machine that runs a model with so many bytes of weights.

        Where they fill at most half of a cache before they are packed, which may double them, they
        stay there from one run to the next: a core's L2, or the last cache.
        """
        if weights_bytes > self.l2_bytes // 2:
            return replace(self, l3_holds=True) if weights_bytes <= self.l3_bytes // 2 else self
        return replace(self, weight_bytes_per_cycle=L2_BYTES_PER_CYCLE * self.threads)

    def pick(self, point: str, options: Mapping[str, Option]) -> Option:
        """Take one of several options: the decided one, else the first.

        Parameters
        ----------
        point : str
            Names what is chosen, such as ``pixels``.
        options : mapping of str to option
            By name, the best by the model first. A decided option that is not among them is
            ignored: it was measured before the template changed.
        """
        if self.asked is not None:
            self.asked[point] = tuple(options)
        name = dict(self.decided).get(point, "")
        return options[name if name in options else next(iter(options))]

    def facts(self) -> dict[str, Any]:
        """Return what the machine is, without decisions, as JSON-able arguments of its class."""
        facts = asdict(self.plain)
        del facts["decided"], facts["asked"]
        return facts

    @property
    def plain(self) -> Machine:
        """The same machine with nothing decided and nobody listening, for cached models."""
        return replace(self, decided=(), asked=None)


def divisors(number: int) -> tuple[int, ...]:
    """Return the divisors of a positive number in ascending order."""
    return tuple(d for d in range(1, number + 1) if number % d == 0)


def choose_tasks(
    machine: Machine,
    *,
    batch: int,
    row_tiles: int,
    channel_tiles: int,
    weight_bytes: int,
    input_bytes: int,
    row_bytes: int,
) -> tuple[int, int]:
    """Choose how many parallel parts the row tiles and the channel tiles are cut into.

    Threads share the cheaper operand: they split channels where the weights are larger than
    `INPUT_BYTE_COST` times the input, else rows, in chunks whose input fits an eighth of L2. The
    other partitions that keep all threads busy follow by the bytes that are read: the weights by
    every row part, the input by every channel part.

    Returns
    -------
    tuple of int
        ``(row parts, channel parts)``; each divides its number of tiles.
    """
    best = _first_tasks(
        machine.threads,
        batch=batch,
        row_tiles=row_tiles,
        channel_tiles=channel_tiles,
        channels_first=weight_bytes > INPUT_BYTE_COST * input_bytes,
        most_rows=machine.l2_bytes // 8 // max(row_bytes, 1),
    )
    others = sorted(
        (weight_bytes * rows + input_bytes * channels, rows * channels, rows, channels)
        for rows in divisors(row_tiles)
        for channels in divisors(channel_tiles)
        if (batch * rows * channels) % machine.threads == 0 and (rows, channels) != best
    )
    ranked = [best, *((rows, channels) for *_, rows, channels in others)]
    return machine.pick("tasks", {f"{r}x{c}": (r, c) for r, c in ranked[:MOST_OPTIONS]})


def unroll_depth(machine: Machine, depth: int) -> int:
    """Choose how many steps of the sum one turn of its innermost loop takes; divides the depth.

    LLVM does not unroll the loop by itself; whether fewer branches pay for the longer body is left
    to the clock.
    """
    return machine.pick("unroll", {str(f): f for f in UNROLLED_STEPS if depth % f == 0})


def _first_tasks(
    threads: int,
    *,
    batch: int,
    row_tiles: int,
    channel_tiles: int,
    channels_first: bool,
    most_rows: int,
) -> tuple[int, int]:
    if channels_first and channel_tiles % threads == 0:
        return 1, threads
    for parts in divisors(row_tiles):
        if (batch * parts) % threads == 0 and row_tiles // parts <= most_rows:
            return parts, 1
    if channel_tiles % threads == 0:
        return 1, threads
    return row_tiles, channel_tiles


# How far ahead of its use a weight is requested, in bytes: some 256 steps of a register tile of two
# vectors, and less than the first level holds (2 KiB gained half as much, 64 KiB the same).
PREFETCH_BYTES = 32 * 1024
# Where streaming takes less of the time of the products than this, requests cost more than the
# wait (56x56 layers).
PREFETCH_SHARE = 0.02


def prefetch_distance(machine: Machine, *, rows: int, weight_bytes: int, itemsize: int = 4) -> int:
    """Choose how many elements ahead the weights of a product are requested.

    Parameters
    ----------
    machine : Machine
        Lanes, threads and caches.
    rows : int
        Pixels, or rows of the left matrix, that each weight is multiplied with.
    weight_bytes : int
        Of all weights of the product.
    itemsize : int
        Bytes of one weight: 2 where 16-bit floats are widened in registers.

    Returns
    -------
    int
        Elements; 0 where the weights are few, or where streaming them takes a small share of the
        time that the products take. A byte streams in 1/20 cycle; its products with 49 pixels
        take ``49 / 4 / 64 = 0.19`` on two cores of 16 lanes.
    """
    if weight_bytes <= machine.l2_bytes // 2:
        return 0
    stream = 1 / WEIGHT_BYTES_PER_CYCLE
    products = rows / 4 / (machine.lanes * FMA_PER_CYCLE * machine.threads)
    return PREFETCH_BYTES // itemsize if stream > PREFETCH_SHARE * products else 0
