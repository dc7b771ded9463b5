"""Tensor intrinsics of integer sums: one vector of int32 sums, `GROUP` products to a lane.

Importing this module registers, for every instruction and vector length, an intrinsic that
`intrinsic_name` names: ``sums[lane] += Σ level[j] × weight[lane, j]``. Levels are one group that
all lanes share, weights one group for each lane. Numerics: exact, in int32.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import s_tir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as ib
from tvm.target.codegen import llvm_lookup_intrinsic_id

from .integer_dot import GROUP, LEVEL_OFFSET, IntegerDot

LANES = {
    IntegerDot.VPDPBUSD: (4, 8, 16),
    IntegerDot.VPMADDWD: (4, 8, 16),
    IntegerDot.USDOT: (4,),
    IntegerDot.SDOT: (4,),
}
"""int32 lanes of each form: 128, 256 and 512 bits."""

_VPDPBUSD = {
    4: "llvm.x86.avx512.vpdpbusd.128",
    8: "llvm.x86.avx512.vpdpbusd.256",
    16: "llvm.x86.avx512.vpdpbusd.512",
}
_VPMADDWD = {
    4: "llvm.x86.sse2.pmadd.wd",
    8: "llvm.x86.avx2.pmadd.wd",
    16: "llvm.x86.avx512.pmaddw.d.512",
}
_USDOT = "llvm.aarch64.neon.usdot"
_SDOT = "llvm.aarch64.neon.sdot"

Step = Callable[[tirx.Expr, tirx.Expr, tirx.Expr], tirx.Expr]


def intrinsic_name(dot: IntegerDot, lanes: int) -> str:
    """Return the registered name of an instruction's intrinsic.

    Parameters
    ----------
    dot : IntegerDot
        The instruction.
    lanes : int
        int32 elements of the vector; one of ``LANES[dot]``.
    """
    return f"hone_{dot}_{lanes}"


def integer_product(level: tirx.Expr, weight: tirx.Expr, offset: int) -> tirx.Expr:
    """Return ``(level - offset) × weight`` in int32, written as the intrinsics expect it."""
    value = tirx.Cast("int32", level)
    if offset:
        value = value - offset
    return value * tirx.Cast("int32", weight)


def _call(name: str, dtype: str, *arguments: tirx.Expr) -> tirx.Expr:
    return tirx.call_llvm_pure_intrin(
        dtype, tirx.const(llvm_lookup_intrinsic_id(name), "uint32"), *arguments
    )


def _bytes_dot(name: str, lanes: int, *, signed: bool = False) -> Step:
    """Return a step whose instruction takes bytes as they are, or less 128 where ``signed``."""

    def step(sums: tirx.Expr, level: tirx.Expr, weight: tirx.Expr) -> tirx.Expr:
        dtype = "int8" if signed else "uint8"
        if signed:
            # 128 less of each byte, which is one bit flipped, read as signed.
            level = level ^ tirx.const(-0x7F7F7F80, "int32")
        levels = tirx.reinterpret(f"{dtype}x{GROUP * lanes}", tirx.Broadcast(level, lanes))
        return _call(name, f"int32x{lanes}", sums, levels, weight)

    return step


def _words_dot(name: str, lanes: int) -> Step:
    """Return a step that widens bytes 0, 2 and bytes 1, 3 of each group to pairs of int16.

    Shifts within a group need no shuffle; the compiler does those of one operand once for all
    vectors that share it.
    """
    words = f"int16x{2 * lanes}"

    def step(sums: tirx.Expr, level: tirx.Expr, weight: tirx.Expr) -> tirx.Expr:
        levels = tirx.reinterpret(f"uint16x{2 * lanes}", tirx.Broadcast(level, lanes))
        weights = tirx.reinterpret(words, weight)
        eight = tirx.Broadcast(tirx.const(8, "int16"), 2 * lanes)
        low = tirx.reinterpret(words, levels & tirx.Broadcast(tirx.const(255, "uint16"), 2 * lanes))
        high = tirx.reinterpret(words, levels >> tirx.Broadcast(tirx.const(8, "uint16"), 2 * lanes))
        sums = sums + _call(name, f"int32x{lanes}", low, (weights << eight) >> eight)
        return sums + _call(name, f"int32x{lanes}", high, weights >> eight)

    return step


def _step(dot: IntegerDot, lanes: int) -> Step:
    if dot is IntegerDot.VPDPBUSD:
        return _bytes_dot(_VPDPBUSD[lanes], lanes)
    if dot is IntegerDot.USDOT:
        return _bytes_dot(_USDOT, lanes)
    if dot is IntegerDot.SDOT:
        return _bytes_dot(_SDOT, lanes, signed=True)
    return _words_dot(_VPMADDWD[lanes], lanes)


def _begin(lanes: int) -> tuple[tirx.Buffer, tirx.Buffer, tirx.Buffer]:
    """Declare the arguments of an intrinsic: levels, weights, sums."""
    ib.func_name("main")
    level = ib.arg("level", ib.Buffer((GROUP,), "uint8", offset_factor=1))
    weight = ib.arg("weight", ib.Buffer((lanes, GROUP), "int8", offset_factor=1))
    return level, weight, ib.arg("sums", ib.Buffer((lanes,), "int32", offset_factor=1))


def _declare(level: tirx.Buffer, weight: tirx.Buffer, sums: tirx.Buffer) -> None:
    lanes = int(sums.shape[0])
    ib.reads(sums[0:lanes], level[0:GROUP], weight[0:lanes, 0:GROUP])
    ib.writes(sums[0:lanes])


def _description(lanes: int, offset: int) -> tirx.PrimFunc:
    """Return the loops that an intrinsic stands for."""
    with IRBuilder() as builder:
        with ib.prim_func(s_tir=True):
            level, weight, sums = _begin(lanes)
            with ib.sblock("root"):
                _declare(level, weight, sums)
                with ib.grid(lanes, GROUP) as (i, j), ib.sblock("update"):
                    vi, vj = ib.axis.spatial(lanes, i), ib.axis.reduce(GROUP, j)
                    product = integer_product(level[vj], weight[vi, vj], offset)
                    ib.buffer_store(sums, sums[vi] + product, [vi])
        return builder.get()


def _implementation(lanes: int, step: Step) -> tirx.PrimFunc:
    """Return the instructions of an intrinsic."""
    with IRBuilder() as builder:
        with ib.prim_func(s_tir=True):
            level, weight, sums = _begin(lanes)
            with ib.sblock("root"):
                _declare(level, weight, sums)
                updated = step(
                    sums.vload([0], f"int32x{lanes}"),
                    tirx.reinterpret("int32", level.vload([0], f"uint8x{GROUP}")),
                    weight.vload([0, 0], f"int8x{GROUP * lanes}"),
                )
                ib.buffer_store(sums, updated, [tirx.Ramp(0, 1, lanes)])
        return builder.get()


def _register() -> None:
    for dot, lengths in LANES.items():
        for lanes in lengths:
            s_tir.TensorIntrin.register(
                intrinsic_name(dot, lanes),
                _description(lanes, LEVEL_OFFSET.get(dot, 0)),
                _implementation(lanes, _step(dot, lanes)),
                override=True,
            )


_register()
