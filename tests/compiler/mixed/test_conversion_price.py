"""Conversions are priced by those that ran, and by their bytes where none did."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from hone.mixed.conversion_price import conversion_us, timed_conversions
from hone.passes.quantize import operators
from hone.profiling.call_times import CallTime


def module() -> tvm.IRModule:
    """``x`` is quantized, moved and dequantized."""
    x = relax.Var("x", relax.TensorType((2, 3, 5), "float32"))
    scale, zero = relax.const(np.float32(0.1)), relax.const(np.int32(3))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            levels = builder.emit(operators.quantize(x, scale, zero), "levels")
            part = relax.op.strided_slice(levels, axes=[2], begin=[0], end=[2])
            moved = builder.emit(part, "moved")
            real = operators.dequantize(moved, scale, zero)
            out = builder.emit_output(real, name_hint="real")
        builder.emit_func_output(out)
    return builder.get()


def test_conversions_that_are_kernels_of_their_own_are_timed() -> None:
    calls = [
        CallTime(kernel="quantize", names=("levels",), us=2.0),
        CallTime(kernel="slice", names=("moved",), us=9.0),
        CallTime(kernel="fused", names=("moved", "real"), us=7.0),
        CallTime(kernel="dequantize", names=("real",), us=1.0),
    ]
    assert timed_conversions(module(), calls) == [(30, 2.0), (12, 1.0)]


def test_price_is_that_of_the_timed_ones_but_at_least_that_of_the_bytes() -> None:
    timed = [(1000, 2.0), (3000, 4.0)]
    assert conversion_us(500, timed, least=0.1) == pytest.approx(0.75)
    assert conversion_us(500, timed, least=3.0) == 3.0
    assert conversion_us(500, [], least=0.1) == 0.1
