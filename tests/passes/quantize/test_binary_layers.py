from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax

from hone.errors import ModelError, UsageError
from hone.passes.quantize.binarize import binarize
from hone.passes.quantize.quantize_weights import quantize_weight_only
from hone.passes.quantize.weight_schemes import Granularity, Scheme, WeightOptions

XNOR = WeightOptions(scheme=Scheme.XNOR)


def network(
    make: Callable[[relax.Expr], relax.Expr], shape: tuple[int, ...], dtype: str = "float32"
) -> tvm.IRModule:
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, dtype))
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(make(x))
        bb.emit_func_output(out)
    return bb.get()


def evaluate(module: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    from hone import pipeline
    from hone.targets.target import resolve

    target = resolve("host")
    lowered = pipeline.lower(module, target, threads=1)
    scheduled = pipeline.schedule(lowered, target, threads=1)
    executable = pipeline.build_executable(scheduled.module, target, threads=1)
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()


def signs(values: np.ndarray) -> np.ndarray:
    return np.where(values >= 0, 1.0, -1.0)


def test_a_product_follows_the_formula(rng) -> None:
    x = rng.standard_normal((3, 2, 37)).astype("float32")
    weight = rng.standard_normal((37, 11)).astype("float32")
    before = network(lambda v: relax.op.matmul(v, relax.const(weight)), x.shape)
    result = quantize_weight_only(before, XNOR)
    relax.analysis.well_formed(result.module)
    names = [str(b.var.name) for b in result.module["main"].body.blocks[0].bindings]
    assert names == [
        "gv@weight", "gv@abs", "gv@mean", "gv@binarize", "gv@product", "gv",
    ]  # fmt: skip
    scale = np.abs(weight).mean(0) * np.abs(x).mean(-1, keepdims=True)
    # The sums of signs are exact; two factors and two means of 37 numbers are rounded.
    np.testing.assert_allclose(
        evaluate(result.module, x), signs(x) @ signs(weight) * scale, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 0, 1, 2)])
def test_a_convolution_follows_the_formula(padding, rng) -> None:
    x = rng.standard_normal((2, 7, 6, 5)).astype("float32")
    weight = rng.standard_normal((9, 3, 3, 5)).astype("float32")
    before = network(
        lambda v: relax.op.nn.conv2d(
            v, relax.const(weight), strides=(2, 1), padding=padding, data_layout="NHWC",
            kernel_layout="OHWI",
        ),
        x.shape,
    )  # fmt: skip
    result = quantize_weight_only(before, XNOR)
    top, left, bottom, right = padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2]
    sums = np.einsum("nhwcrs,krsc->nhwk", signs(windows), signs(weight))
    scale = np.abs(weight).mean((1, 2, 3)) * np.abs(windows).mean((3, 4, 5))[..., None]
    np.testing.assert_allclose(evaluate(result.module, x), sums * scale, rtol=1e-5, atol=1e-5)


def test_a_table_has_no_signs_to_take() -> None:
    table = relax.const(np.ones((4, 3), np.float32))
    before = network(lambda v: relax.op.take(table, v, axis=0), (2,), "int64")
    result = quantize_weight_only(before, XNOR)
    assert result.module.same_as(before)
    assert [s.reason for s in result.skipped] == ["a table has no activations to take the signs of"]


def test_groups_are_refused() -> None:
    with pytest.raises(UsageError, match="binary activations need one scale"):
        WeightOptions(scheme=Scheme.XNOR, granularity=Granularity.GROUP)


def test_only_floats_have_signs() -> None:
    with pytest.raises(ModelError) as caught:
        binarize(relax.Var("x", relax.TensorType((2,), "int8")))
    assert caught.value.message == "data must be float32, not int8"
