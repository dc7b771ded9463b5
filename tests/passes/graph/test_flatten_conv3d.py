"""3-D convolutions become 2-D ones that compute the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import assert_structural_equal

from hone.passes.apply import apply
from hone.passes.graph.flatten_conv3d import FlattenConv3d


def module(
    shape: tuple[int, ...], make: Callable[[relax.BlockBuilder, relax.Var], relax.Expr]
) -> tvm.IRModule:
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(builder.normalize(make(builder, x)), "gv")
        builder.emit_func_output(result)
    return builder.get()


def run(of: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(tvm.compile(of, "llvm"), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x)).numpy()


def test_depths_become_images_and_taps_become_channels() -> None:
    weight = np.arange(3 * 2 * 2, dtype="float32").reshape(3, 2, 2, 1, 1)

    def before(_: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
        return relax.op.nn.conv3d(x, relax.const(weight))

    def expected(bb: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
        parts = []
        for tap in range(2):
            cut = relax.op.strided_slice(x, axes=[2], begin=[tap], end=[tap + 3], strides=[1])
            parts.append(bb.emit(relax.op.reshape(bb.emit(cut), (1, 1, 2, 3, 5, 6))))
        joined = bb.emit(relax.op.concat(parts, axis=2))
        moved = bb.emit(relax.op.permute_dims(joined, [0, 3, 1, 2, 4, 5]))
        flat = bb.emit(relax.op.reshape(moved, (3, 4, 5, 6)))
        kernel = weight[..., 0, 0].transpose(0, 2, 1).reshape(3, 4, 1, 1).copy()
        images = bb.emit(relax.op.nn.conv2d(flat, relax.const(kernel)))
        apart = bb.emit(relax.op.reshape(images, (1, 3, 3, 5, 6)))
        return relax.op.permute_dims(apart, [0, 2, 1, 3, 4])

    after = apply(module((1, 2, 4, 5, 6), before), FlattenConv3d())
    assert_structural_equal(after, module((1, 2, 4, 5, 6), expected))
    assert_structural_equal(apply(after, FlattenConv3d()), after)


@pytest.mark.parametrize(
    ("x", "k", "taps", "where"),
    [((1, 3, 5, 7, 6), 4, (3, 3, 3), {"padding": 1}),
     ((2, 4, 6, 5, 7), 6, (2, 3, 1), {"strides": (2, 1, 2), "groups": 2}),
     ((1, 2, 7, 6, 5), 3, (3, 2, 2), {"dilation": (2, 1, 2), "padding": (1, 0, 1, 2, 1, 0)}),
     ((1, 3, 1, 4, 4), 2, (1, 3, 3), {})],
    ids=str,
)  # fmt: skip
def test_flattened_convolution_computes_what_it_did(
    x: tuple[int, ...], k: int, taps: tuple[int, ...], where: dict, rng: np.random.Generator
) -> None:
    weight = rng.standard_normal((k, x[1] // where.get("groups", 1), *taps)).astype("float32")
    before = module(x, lambda _, v: relax.op.nn.conv3d(v, relax.const(weight), **where))
    after = apply(before, FlattenConv3d())
    assert "nn.conv3d" not in str(after)
    data = rng.standard_normal(x).astype("float32")
    np.testing.assert_allclose(run(after, data), run(before, data), rtol=1e-4, atol=1e-4)


def test_convolution_stays_when_its_weights_are_computed() -> None:
    weight = relax.const(np.ones((3, 2, 2, 1, 1), "float32"))
    before = module(
        (1, 2, 4, 5, 6),
        lambda bb, x: relax.op.nn.conv3d(x, bb.emit(relax.op.exp(weight))),
    )
    assert apply(before, FlattenConv3d())["main"].same_as(before["main"])
