"""Tensor intrinsic of products of small matrices: two pixels by two channels of int32 sums.

Importing this module registers `NAME`: ``sums[i, j] += Σ level[i, b] × weight[j, b]`` over the
`MATRIX_GROUP` bytes of a group. Numerics: exact, in int32.
"""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as ib
from tvm.target.codegen import llvm_lookup_intrinsic_id

from .dot_intrinsics import integer_product
from .integer_dot import MATRIX_GROUP, SIDE

NAME = "hone_usmmla"
"""Of the registered intrinsic."""

_USMMLA = "llvm.aarch64.neon.usmmla"


def _begin() -> tuple[tirx.Buffer, tirx.Buffer, tirx.Buffer]:
    """Declare the arguments: levels of two pixels, weights of two channels, their sums."""
    ib.func_name("main")
    operand = (SIDE, MATRIX_GROUP)
    level = ib.arg("level", ib.Buffer(operand, "uint8", offset_factor=1))
    weight = ib.arg("weight", ib.Buffer(operand, "int8", offset_factor=1))
    return level, weight, ib.arg("sums", ib.Buffer((SIDE, SIDE), "int32", offset_factor=1))


def _declare(level: tirx.Buffer, weight: tirx.Buffer, sums: tirx.Buffer) -> None:
    ib.reads(sums[0:SIDE, 0:SIDE], level[0:SIDE, 0:MATRIX_GROUP], weight[0:SIDE, 0:MATRIX_GROUP])
    ib.writes(sums[0:SIDE, 0:SIDE])


def _description() -> tirx.PrimFunc:
    """Return the loops that the intrinsic stands for."""
    with IRBuilder() as builder:
        with ib.prim_func(s_tir=True):
            level, weight, sums = _begin()
            with ib.sblock("root"):
                _declare(level, weight, sums)
                with ib.grid(SIDE, SIDE, MATRIX_GROUP) as (i, j, b), ib.sblock("update"):
                    pixel, channel = ib.axis.spatial(SIDE, i), ib.axis.spatial(SIDE, j)
                    byte = ib.axis.reduce(MATRIX_GROUP, b)
                    product = integer_product(level[pixel, byte], weight[channel, byte], 0)
                    ib.buffer_store(sums, sums[pixel, channel] + product, [pixel, channel])
        return builder.get()


def _implementation() -> tirx.PrimFunc:
    """Return the instruction."""
    with IRBuilder() as builder:
        with ib.prim_func(s_tir=True):
            level, weight, sums = _begin()
            with ib.sblock("root"):
                _declare(level, weight, sums)
                lanes, size = SIDE * SIDE, SIDE * MATRIX_GROUP
                updated = tirx.call_llvm_pure_intrin(
                    f"int32x{lanes}",
                    tirx.const(llvm_lookup_intrinsic_id(_USMMLA), "uint32"),
                    sums.vload([0, 0], f"int32x{lanes}"),
                    level.vload([0, 0], f"uint8x{size}"),
                    weight.vload([0, 0], f"int8x{size}"),
                )
                ib.buffer_store(sums, updated, [0, tirx.Ramp(0, 1, lanes)])
        return builder.get()


s_tir.TensorIntrin.register(NAME, _description(), _implementation(), override=True)
