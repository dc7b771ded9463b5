from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax

from hone.passes.distill import gradients

RNG = np.random.default_rng(0)
GAMMA = np.array([0.5, -1.0, 2.0, 1.5], "float32")

# Away from the kinks of clip and leakyrelu by more than the step of the finite differences.
OPERATORS: dict[str, tuple[Callable[[relax.Expr], relax.Expr], Callable[[np.ndarray], np.ndarray]]]
OPERATORS = {
    "clip": (lambda x: relax.op.clip(x, -0.5, 1.25), lambda x: np.clip(x, -0.5, 1.25)),
    "erf": (relax.op.erf, np.vectorize(math.erf)),
    "gelu": (
        relax.op.nn.gelu,
        lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    ),
    "layer_norm": (
        lambda x: relax.op.nn.layer_norm(
            x, relax.const(GAMMA), relax.const(GAMMA), axes=[-1], epsilon=0.1
        ),
        lambda x: (
            (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 0.1) * GAMMA + GAMMA
        ),
    ),
    "leakyrelu": (
        lambda x: relax.op.nn.leakyrelu(x, 0.1),
        lambda x: np.where(x > 0, x, 0.1 * x),
    ),
    "rsqrt": (
        lambda x: relax.op.rsqrt(relax.op.add(relax.op.multiply(x, x), relax.const(1.0))),
        lambda x: 1 / np.sqrt(x * x + 1),
    ),
    "square": (relax.op.square, np.square),
    "pad": (
        lambda x: relax.op.nn.pad(x, [0, 1, 2, 0], pad_value=3.0),
        lambda x: np.pad(x, ((0, 1), (2, 0)), constant_values=3.0),
    ),
    "expand_dims": (lambda x: relax.op.expand_dims(x, [1]), lambda x: x[:, None]),
    "squeeze": (
        lambda x: relax.op.squeeze(relax.op.reshape(x, (3, 1, 4)), [1]),
        lambda x: x.reshape(3, 4),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_gradient_equals_finite_differences_when_the_operator_is_ours(name: str) -> None:
    gradients.register()
    operator, oracle = OPERATORS[name]
    x = RNG.standard_normal((3, 4)) * 1.5
    x[np.abs(x) < 0.01] = 0.02
    factors = RNG.standard_normal(oracle(x).shape)
    var = relax.Var("x", relax.TensorType((3, 4), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [var]):
        with builder.dataflow():
            y = builder.emit(operator(var))
            y = builder.emit(relax.op.multiply(y, relax.const(factors.astype("float32"))))
            gv = builder.emit_output(relax.op.sum(y))
        builder.emit_func_output(gv)
    module = relax.transform.Gradient("main")(builder.get())
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    _, (slope,) = machine["main_adjoint"](tvm.runtime.tensor(x.astype("float32")))
    step = 1e-6
    for index in np.ndindex(*x.shape):
        moved = np.zeros_like(x)
        moved[index] = step
        difference = ((oracle(x + moved) - oracle(x - moved)) * factors).sum() / (2 * step)
        # TVM's erf is a rational approximation, good to about 1e-6.
        np.testing.assert_allclose(slope.numpy()[index], difference, rtol=1e-4, atol=1e-4)


def test_layer_norm_gradients_of_scale_and_offset_when_they_are_parameters() -> None:
    gradients.register()
    x = RNG.standard_normal((3, 4))
    types = [relax.TensorType(shape, "float32") for shape in ((4,), (4,))]
    params = [relax.Var(name, ty) for name, ty in zip(("gamma", "beta"), types, strict=True)]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            data = relax.const(x.astype("float32"))
            y = builder.emit(relax.op.nn.layer_norm(data, *params, axes=[-1], epsilon=0.1))
            gv = builder.emit_output(relax.op.sum(y))
        builder.emit_func_output(gv)
    module = relax.transform.Gradient("main")(builder.get())
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    _, slopes = machine["main_adjoint"](*[tvm.runtime.tensor(GAMMA)] * 2)
    normal = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 0.1)
    np.testing.assert_allclose(slopes[0].numpy(), normal.sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slopes[1].numpy(), np.full(4, 3.0), rtol=1e-6)


def test_has_gradient_tells_when_an_operator_has_none() -> None:
    gradients.register()
    assert gradients.has_gradient(tvm.ir.Op.get("relax.nn.conv2d"))
    assert gradients.has_gradient(tvm.ir.Op.get("relax.erf"))
    assert not gradients.has_gradient(tvm.ir.Op.get("relax.sort"))
