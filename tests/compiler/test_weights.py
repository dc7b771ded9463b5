from __future__ import annotations

from pathlib import Path

import numpy as np
import tvm
from tvm import relax

from hone import pipeline
from hone.passes.apply import apply
from hone.passes.quantize.observer import Range
from hone.passes.quantize.quantize_int8 import quantize_int8
from hone.targets.target import Target, resolve
from hone.weights import weights_bytes


def product(weights: list[np.ndarray]) -> tvm.IRModule:
    x = relax.Var("x", relax.TensorType((2, weights[0].shape[0]), "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x]):
        with bb.dataflow():
            value: relax.Expr = x
            for weight in weights:
                value = bb.emit(relax.op.matmul(value, relax.const(weight)))
            out = bb.emit_output(value)
        bb.emit_func_output(out)
    return bb.get()


def test_constants_are_counted_once_when_they_are_equal() -> None:
    one = np.arange(12, dtype=np.float32).reshape(3, 4)
    square = np.ones((4, 4), np.float32)
    assert weights_bytes(product([one])) == 48
    assert weights_bytes(product([one, square, square.copy()])) == 48 + 64
    # The same bytes in another shape are another constant.
    assert weights_bytes(product([one, np.ones((4, 2), np.float32), np.ones((2, 4))])) > 48 + 32


def test_packing_and_padding_are_counted() -> None:
    module = product([np.ones((7, 5), np.float32)])
    unit = Range(minimum=-1.0, maximum=1.0)
    integer = quantize_int8(module, {"x": unit}).module
    packed = apply(integer, relax.transform.LegalizeOps())
    # 16 channels × 7 int8; bias int32 and multiplier float32 of 5; levels; scale and zero point.
    assert weights_bytes(packed) == 16 * 7 + 5 * 4 + 5 * 4 + 4 + 4 + 4


def test_count_is_what_the_library_stores(tmp_path: Path) -> None:
    target: Target = resolve("host")
    rng = np.random.default_rng(0)

    def library_bytes(weight: np.ndarray) -> tuple[int, int]:
        lowered = pipeline.lower(product([weight]), target, threads=1)
        scheduled = pipeline.schedule(lowered, target, threads=1).module
        return weights_bytes(lowered), len(pipeline.link(scheduled, target, threads=1))

    small, small_library = library_bytes(rng.normal(size=(64, 64)).astype(np.float32))
    large, large_library = library_bytes(rng.normal(size=(64, 4096)).astype(np.float32))
    assert large >= 64 * small
    # Pages of 4 KiB and the code of two differently tiled loops.
    assert abs((large_library - small_library) - (large - small)) < 64 * 1024
