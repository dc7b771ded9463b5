"""Measures the limits of this machine with kernels of hone's own making."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as ir
from tvm.target.codegen import llvm_lookup_intrinsic_id

from hone.packaging.tvm_runtime import Threads, tvm_runtime
from hone.targets.container import memory_limit
from hone.targets.half_dot import BFLOAT16, PAIR, HalfDot, half_dot_of
from hone.targets.half_intrinsics import add_name, pair_name
from hone.targets.target import Target
from hone.tuning.builder import build

from .roofline import Level, Peak, Roofline

# So much in one call that starting its threads does not count: a millisecond or two.
STEPS_PER_CALL = 1 << 18
BYTES_PER_CALL = 256 << 20
CALLS = 25
# Vectors that one iteration of a stream loads: several, so that no addition waits for another.
STREAMS = 8
# Processor time over time that passed, below which somebody else has had a processor.
QUIET = 0.9
LEAST_MEMORY_BYTES = 64 << 20
MOST_MEMORY_BYTES = 1 << 30
GROUP = 4  # bytes that a dot product sums into one int32


def measure(target: Target, *, threads: int) -> Roofline:
    """Measure arithmetic in registers, and streams through each cache and through memory.

    Parameters
    ----------
    target : Target
        Must run here.
    threads : int
        Threads that share the work.
    """
    bench = _Bench(target, threads)
    peaks = {"float32": bench.multiply_add()}
    if (dot := byte_dot(target)) is not None:
        peaks["int8"] = bench.dot(dot)
    if (pairs := half_dot_of(target)) is not None:
        peaks[BFLOAT16] = bench.pairs(pairs)
    levels = tuple(bench.level(*level) for level in capacities(target, threads))
    return Roofline(threads=threads, peaks=peaks, levels=levels, quiet=min(bench.shares) >= QUIET)


def capacities(target: Target, threads: int) -> list[tuple[str, int | None, int]]:
    """Return ``(name, capacity, footprint)`` of each level; capacities and footprints grow.

    A footprint is half of its cache, which leaves room for whatever else is in it; memory is
    measured with four times the last cache, between 64 MiB and 1 GiB.
    """
    sizes = [
        ("L1", target.l1d_bytes * threads),
        ("L2", target.l2_bytes * threads),
        ("L3", target.l3_bytes),
    ]
    levels: list[tuple[str, int | None, int]] = []
    largest = 0
    for name, size in sizes:
        # A cache that is not larger than the one before it holds nothing more.
        if size > largest:
            levels.append((name, size, size // 2))
            largest = size
    room = min(memory_limit() or MOST_MEMORY_BYTES, os.sysconf("SC_AVPHYS_PAGES") * 4096) // 4
    footprint = min(max(4 * largest, LEAST_MEMORY_BYTES), MOST_MEMORY_BYTES, room)
    levels.append(("memory", None, max(footprint, 2 * largest)))
    if any(one[2] >= other[2] for one, other in pairwise(levels)):
        raise ValueError(f"footprints must grow, these are {levels}")
    return levels


@dataclass(frozen=True, kw_only=True)
class ByteDot:
    """An instruction that sums products of bytes.

    Parameters
    ----------
    intrinsic : str
        Its name in LLVM.
    lanes : int
        int32 sums of one vector.
    left : str
        Type of its first bytes; the second ones are int8.
    """

    intrinsic: str
    lanes: int
    left: str


def byte_dot(target: Target) -> ByteDot | None:
    """Return the widest dot product of bytes among the vector instructions of a target.

    Matrix units (AMX, SMMLA) are not vector instructions and are not looked at.
    """
    if target.arch == "aarch64":
        if "dotprod" in target.features:
            return ByteDot(intrinsic="llvm.aarch64.neon.sdot", lanes=4, left="int8")
        return None
    if "avx512vnni" in target.features and target.vector_bits == 512:
        return ByteDot(intrinsic="llvm.x86.avx512.vpdpbusd.512", lanes=16, left="uint8")
    if {"avxvnni", "avx512vnni"} & set(target.features):
        return ByteDot(intrinsic="llvm.x86.avx512.vpdpbusd.256", lanes=8, left="uint8")
    return None


class _Bench:
    """Builds and times kernels for one target."""

    def __init__(self, target: Target, threads: int) -> None:
        self.target = target
        self.threads = threads
        self.lanes = target.vector_bits // 32
        self.shares: list[float] = []
        self._pool = Threads(threads, tvm_runtime())
        # Beside the sums there are two operands in registers.
        self._sums = min(24, target.vector_registers - 4)

    def multiply_add(self) -> Peak:
        """Measure fused multiply-adds of float32 vectors that stay in registers."""
        vector = f"float32x{self.lanes}"

        def step(sums: tirx.Expr, x: tirx.Buffer) -> tirx.Expr:
            return sums * x.vload([0, 0], vector) + x.vload([1, 0], vector)

        # s = s / 2 + 1 stays at 2: no overflow and no subnormal number.
        operands = np.repeat(np.array([[0.5], [1.0]], np.float32), self.lanes, axis=1)
        return Peak(
            instruction=f"{self.target.vector_bits}-bit multiply-add",
            operations_per_second=2 * self._steps(operands, step),
        )

    def dot(self, dot: ByteDot) -> Peak:
        """Measure dot products of bytes that stay in registers."""
        sums_type = f"int32x{dot.lanes}"
        types = tuple(f"{name}x{GROUP * dot.lanes}" for name in (dot.left, "int8"))
        number = tirx.const(llvm_lookup_intrinsic_id(dot.intrinsic), "uint32")

        def step(sums: tirx.Expr, x: tirx.Buffer) -> tirx.Expr:
            operands = (
                tirx.reinterpret(dtype, x.vload([row, 0], sums_type))
                for row, dtype in enumerate(types)
            )
            return tirx.call_llvm_pure_intrin(sums_type, number, sums, *operands)

        operands = np.ones((2, GROUP * dot.lanes), np.int8).view(np.int32)
        return Peak(
            instruction=f"{32 * dot.lanes}-bit {'sdot' if dot.left == 'int8' else 'vpdpbusd'}",
            operations_per_second=2 * GROUP * self._steps(operands, step),
        )

    def pairs(self, dot: HalfDot) -> Peak:
        """Measure products of bfloat16 pairs that stay in registers, summed in float32."""
        vector = f"float32x{self.lanes}"
        total, product = (tvm.ir.Op.get(name(dot)) for name in (add_name, pair_name))

        def step(sums: tirx.Expr, x: tirx.Buffer) -> tirx.Expr:
            words = (
                tirx.reinterpret(f"int32x{self.lanes}", x.vload([row, 0], vector))
                for row in range(2)
            )
            pair = tirx.call_intrin(vector, product, *words)
            return tirx.call_intrin(vector, total, sums, pair)

        # A float32 of 1 is a pair of 0 and 1.
        operands = np.ones((2, self.lanes), np.float32)
        return Peak(
            instruction=f"{32 * self.lanes}-bit {dot}",
            operations_per_second=2 * PAIR * self._steps(operands, step),
        )

    def _steps(
        self, operands: np.ndarray, step: Callable[[tirx.Expr, tirx.Buffer], tirx.Expr]
    ) -> float:
        """Return how often in a second a step is done for one lane, over all threads."""
        dtype, lanes = str(operands.dtype), int(operands.shape[1])
        iterations = STEPS_PER_CALL // self._sums
        vector = f"{dtype}x{lanes}"
        with IRBuilder() as builder:
            with ir.prim_func(s_tir=True):
                x, y = self._arguments(operands.shape, (self.threads, self._sums * lanes), dtype)
                with ir.parallel(0, self.threads) as t:
                    sums = ir.alloc_buffer((self._sums * lanes,), dtype)
                    with ir.unroll(0, self._sums) as j:
                        _store(sums, _zeros(dtype, lanes), [], j * lanes, lanes)
                    with ir.serial(0, iterations), ir.unroll(0, self._sums) as j:
                        _store(sums, step(sums.vload([j * lanes], vector), x), [], j * lanes, lanes)
                    with ir.unroll(0, self._sums) as j:
                        _store(y, sums.vload([j * lanes], vector), [t], j * lanes, lanes)
            kernel = builder.get()
        result = np.zeros((self.threads, self._sums * lanes), dtype)
        seconds = self._best(kernel, [operands, result])
        return self.threads * self._sums * lanes * iterations / seconds

    def level(self, name: str, capacity: int | None, footprint: int) -> Level:
        """Measure streams over so many bytes, all threads together."""
        rate = max(self._read(footprint), self._triad(footprint))
        return Level(
            name=name,
            capacity_bytes=capacity,
            footprint_bytes=footprint,
            bytes_per_second=rate,
        )

    def _columns(self, footprint: int, arrays: int) -> tuple[int, int, int]:
        """Return blocks of a row, elements of a row, and how often a call goes over it."""
        block = STREAMS * self.lanes
        blocks = max(footprint // (4 * arrays * self.threads * block), 1)
        return blocks, blocks * block, max(BYTES_PER_CALL // footprint, 1)

    def _read(self, footprint: int) -> float:
        """Return the bytes that can be read and summed in a second."""
        blocks, length, passes = self._columns(footprint, 1)
        lanes, vector = self.lanes, f"float32x{self.lanes}"
        with IRBuilder() as builder:
            with ir.prim_func(s_tir=True):
                x, y = self._arguments((self.threads, length), (self.threads, STREAMS * lanes))
                with ir.parallel(0, self.threads) as t:
                    sums = ir.alloc_buffer((STREAMS * lanes,), "float32")
                    with ir.unroll(0, STREAMS) as j:
                        _store(sums, _zeros("float32", lanes), [], j * lanes, lanes)
                    with (
                        ir.serial(0, passes),
                        ir.serial(0, blocks) as i,
                        ir.unroll(0, STREAMS) as j,
                    ):
                        loaded = x.vload([t, (i * STREAMS + j) * lanes], vector)
                        total = sums.vload([j * lanes], vector) + loaded
                        _store(sums, total, [], j * lanes, lanes)
                    with ir.unroll(0, STREAMS) as j:
                        _store(y, sums.vload([j * lanes], vector), [t], j * lanes, lanes)
            kernel = builder.get()
        # Written, because untouched pages are all the same one.
        data = np.full((self.threads, length), 1.0, np.float32)
        result = np.zeros((self.threads, STREAMS * lanes), np.float32)
        return data.nbytes * passes / self._best(kernel, [data, result])

    def _triad(self, footprint: int) -> float:
        """Return the bytes of ``c = a + s b`` in a second (McCalpin 1995): two reads, a write."""
        blocks, length, passes = self._columns(footprint, 3)
        lanes, vector = self.lanes, f"float32x{self.lanes}"
        with IRBuilder() as builder:
            with ir.prim_func(s_tir=True):
                x, y = self._arguments((self.threads, 2 * length), (self.threads, length))
                with (
                    ir.parallel(0, self.threads) as t,
                    ir.serial(0, passes) as r,
                    ir.serial(0, blocks) as i,
                    ir.unroll(0, STREAMS) as j,
                ):
                    at = (i * STREAMS + j) * lanes
                    scale = tirx.Broadcast(tirx.Cast("float32", r), lanes)
                    total = x.vload([t, at], vector) + scale * x.vload([t, length + at], vector)
                    _store(y, total, [t], at, lanes)
            kernel = builder.get()
        data = np.full((self.threads, 2 * length), 1.0, np.float32)
        result = np.full((self.threads, length), 1.0, np.float32)
        moved = data.nbytes + result.nbytes
        return moved * passes / self._best(kernel, [data, result])

    def _arguments(
        self, source: tuple[int, ...], result: tuple[int, ...], dtype: str = "float32"
    ) -> tuple[tirx.Buffer, tirx.Buffer]:
        """Declare a kernel's two arguments."""
        ir.func_name("main")
        ir.func_attr({"tirx.noalias": True})
        x = ir.arg("x", ir.Buffer(source, dtype))
        return x, ir.arg("y", ir.Buffer(result, dtype))

    def _best(self, kernel: tirx.PrimFunc, arrays: Sequence[np.ndarray]) -> float:
        """Return the seconds of the fastest call."""
        built = build(tvm.IRModule({"main": kernel}), self.target.tvm_target(self.threads))
        arguments = [tvm.runtime.tensor(array) for array in arrays]
        function: Callable[..., object] = built["main"]
        found: list[tuple[float, float]] = []
        for _ in range(CALLS):
            started, running = time.perf_counter(), time.process_time()
            self._pool.call(function, arguments)
            seconds, busy = time.perf_counter() - started, time.process_time() - running
            found.append((seconds, busy / (seconds * self.threads)))
        seconds, share = min(found)
        self.shares.append(share)
        return seconds


def _zeros(dtype: str, lanes: int) -> tirx.Expr:
    return tirx.Broadcast(tirx.const(0, dtype), lanes)


def _store(
    buffer: tirx.Buffer,
    value: tirx.Expr,
    outer: Sequence[tirx.Expr],
    start: tirx.Expr,
    lanes: int,
) -> None:
    ir.buffer_store(buffer, value, [*outer, tirx.Ramp(start, 1, lanes)])
