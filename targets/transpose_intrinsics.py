"""Tensor intrinsics that transpose a square of float32, a vector to a side, by shuffles.

Importing this module registers one for each vector length, which `intrinsic_name` names. LLVM
makes of the plain loops an insertion for each element. Numerics: exact.
"""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as ib

SIDES = (4, 8, 16)
"""Elements of a vector: 128, 256 and 512 bits."""


def intrinsic_name(side: int) -> str:
    """Return the registered name of the intrinsic that transposes ``side x side``."""
    return f"hone_transpose_{side}"


def _interleave(first: tirx.Var, second: tirx.Var, side: int, half: int) -> tirx.Expr:
    """Return the first or second half of two vectors whose elements take turns."""
    chosen = [
        tirx.const(lane // 2 + half * side // 2 + lane % 2 * side, "int32") for lane in range(side)
    ]
    return tirx.Shuffle([first, second], chosen)


def _begin(side: int) -> tuple[tirx.Buffer, tirx.Buffer]:
    """Declare the arguments of an intrinsic: source and result, rows at any distance."""
    ib.func_name("main")
    buffers = []
    for name in ("source", "result"):
        strides = [tirx.Var(f"{name}_stride", "int32"), tirx.const(1, "int32")]
        buffer = ib.Buffer((side, side), "float32", strides=strides, offset_factor=1)
        buffers.append(ib.arg(name, buffer))
    return buffers[0], buffers[1]


def _description(side: int) -> tirx.PrimFunc:
    """Return the loops that an intrinsic stands for."""
    with IRBuilder() as builder:
        with ib.prim_func(s_tir=True):
            source, result = _begin(side)
            with ib.sblock("root"):
                ib.reads(source[0:side, 0:side])
                ib.writes(result[0:side, 0:side])
                with ib.grid(side, side) as (i, j), ib.sblock("turn"):
                    vi, vj = ib.axis.spatial(side, i), ib.axis.spatial(side, j)
                    ib.buffer_store(result, source[vj, vi], [vi, vj])
        return builder.get()


def _implementation(side: int) -> tirx.PrimFunc:
    """Return the shuffles of an intrinsic: each round interleaves rows half the side apart."""
    with IRBuilder() as builder:
        with ib.prim_func(s_tir=True):
            source, result = _begin(side)
            with ib.sblock("root"):
                ib.reads(source[0:side, 0:side])
                ib.writes(result[0:side, 0:side])
                rows = [ib.Bind(source.vload([i, 0], f"float32x{side}")) for i in range(side)]
                for _ in range(side.bit_length() - 1):
                    rows = [
                        ib.Bind(
                            _interleave(rows[i // 2], rows[i // 2 + side // 2], side, half=i % 2)
                        )
                        for i in range(side)
                    ]
                for i, row in enumerate(rows):
                    ib.buffer_store(result, row, [i, tirx.Ramp(0, 1, side)])
        return builder.get()


def _register() -> None:
    for side in SIDES:
        s_tir.TensorIntrin.register(
            intrinsic_name(side), _description(side), _implementation(side), override=True
        )


_register()
