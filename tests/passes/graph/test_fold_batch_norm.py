from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import assert_structural_equal

from hone.passes.graph.fold_batch_norm import BATCH_NORMALIZED, FoldBatchNorm

BATCH_NORM = tvm.ir.Op.get("relax.nn.batch_norm")
EPSILON = 1e-3


def stats(channels: int, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    gamma, beta, mean = rng.standard_normal((3, channels)).astype("float32")
    return [gamma, beta, mean, rng.uniform(0.5, 2.0, channels).astype("float32")]


def oracle(x: np.ndarray, parameters: list[np.ndarray], axis: int) -> np.ndarray:
    shape = [-1 if dim == axis % x.ndim else 1 for dim in range(x.ndim)]
    gamma, beta, mean, variance = (p.astype("float64").reshape(shape) for p in parameters)
    return gamma * (x - mean) / np.sqrt(variance + EPSILON) + beta


def run(module: tvm.IRModule, *inputs: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    return machine["main"](*[tvm.runtime.tensor(x) for x in inputs]).numpy()


class Net:
    """Builds ``main``: an input of a shape, then bindings with chosen names."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.x = relax.Var("x", relax.TensorType(shape, "float32"))
        self.builder = relax.BlockBuilder()
        self.bindings: list[relax.VarBinding] = []

    def emit(self, name: str, value: relax.Expr, kind: type = relax.DataflowVar) -> relax.Var:
        value = self.builder.normalize(value)
        var = kind(name, value.ty)
        self.bindings.append(relax.VarBinding(var, value))
        return var

    def norm(self, x: relax.Expr, channels: int, axis: int = 1, **changes: object) -> relax.Var:
        options = {"axis": axis, "epsilon": EPSILON, "training": False} | changes
        parameters = [relax.const(p) for p in stats(channels)]
        tuple_ = self.emit("bn@batch_norm", relax.op.nn.batch_norm(x, *parameters, **options))
        return self.emit("bn", relax.TupleGetItem(tuple_, 0))

    def module(self, result: relax.Expr) -> tvm.IRModule:
        output = self.emit("gv", result, relax.Var)
        body = relax.SeqExpr([relax.DataflowBlock(self.bindings)], output)
        body = self.builder.normalize(body)
        function = relax.Function([self.x], body, output.ty)
        return tvm.IRModule({"main": function.with_attr("global_symbol", "main")})


def names(module: tvm.IRModule) -> list[str]:
    return [binding.var.name for binding in module["main"].body.blocks[0].bindings]


def operators(module: tvm.IRModule) -> list[str]:
    values = [binding.value for binding in module["main"].body.blocks[0].bindings]
    return [v.op.name.removeprefix("relax.") for v in values if isinstance(v, relax.Call)]


@dataclass(frozen=True, kw_only=True)
class Convolution:
    id: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    options: dict[str, object]
    channels: int
    axis: int
    bias: tuple[int, ...] | None = None
    op: str = "conv2d"


FOLDED = [
    Convolution(id="nchw", x=(1, 3, 5, 4), w=(7, 3, 3, 2), options={}, channels=7, axis=1),
    Convolution(
        id="nchw-bias",
        x=(1, 3, 5, 4),
        w=(7, 3, 3, 2),
        options={},
        channels=7,
        axis=1,
        bias=(1, 7, 1, 1),
    ),
    Convolution(
        id="scalar-bias",
        x=(1, 3, 5, 4),
        w=(7, 3, 3, 2),
        options={},
        channels=7,
        axis=-3,
        bias=(),
    ),
    Convolution(
        id="nhwc",
        x=(2, 5, 4, 3),
        w=(7, 3, 2, 3),
        options={"data_layout": "NHWC", "kernel_layout": "OHWI"},
        channels=7,
        axis=3,
        bias=(7,),
    ),
    Convolution(
        id="nhwc-hwio",
        x=(2, 5, 4, 3),
        w=(3, 2, 3, 7),
        options={"data_layout": "NHWC", "kernel_layout": "HWIO"},
        channels=7,
        axis=-1,
    ),
    Convolution(
        id="grouped", x=(1, 4, 5, 6), w=(6, 2, 3, 2), options={"groups": 2}, channels=6, axis=1
    ),
    Convolution(
        id="depthwise", x=(1, 4, 5, 6), w=(4, 1, 3, 2), options={"groups": 4}, channels=4, axis=1
    ),
    Convolution(id="conv1d", x=(1, 3, 9), w=(5, 3, 2), options={}, channels=5, axis=1, op="conv1d"),
    Convolution(
        id="transposed",
        x=(1, 3, 5, 4),
        w=(3, 7, 3, 2),
        options={},
        channels=7,
        axis=1,
        op="conv2d_transpose",
    ),
]


@pytest.mark.parametrize("case", FOLDED, ids=lambda case: case.id)
def test_fold_equals_convolution_then_batch_norm_when_layout_and_axis_agree(
    case: Convolution,
) -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype("float32") for shape in (case.x, case.w))
    net = Net(case.x)
    y = getattr(relax.op.nn, case.op)(net.x, relax.const(w), **case.options)
    if case.bias is None:
        y = net.emit("conv", y)
    else:
        bias = rng.standard_normal(case.bias).astype("float32")
        y = net.emit("conv", relax.op.add(net.emit(f"conv@{case.op}", y), relax.const(bias)))
    before = net.module(net.norm(y, case.channels, case.axis))
    plain = Net(case.x)
    plain.bindings = net.bindings[: 1 if case.bias is None else 2]
    plain.x = net.x
    want = oracle(run(plain.module(y), x).astype("float64"), stats(case.channels), case.axis)
    after = FoldBatchNorm()(before)
    assert operators(after) == [f"nn.{case.op}", "add"]
    assert names(after) == [f"conv@{case.op}", "conv", "gv"]
    # float32 sums of at most 18 products of size about 1, in another order and rescaled by < 2.
    np.testing.assert_allclose(run(after, x), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_fold_equals_matmul_then_batch_norm_when_axis_is_the_last(bias: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5)).astype("float32")
    w, b = rng.standard_normal((7, 5)).astype("float32"), rng.standard_normal(7).astype("float32")
    net = Net((3, 5))
    weight = net.emit("fc@permute_dims", relax.op.permute_dims(relax.const(w)))
    y = net.emit("fc@matmul" if bias else "fc", relax.op.matmul(net.x, weight))
    if bias:
        y = net.emit("fc", relax.op.add(relax.const(b), y))
    after = FoldBatchNorm()(net.module(net.norm(y, 7)))
    assert operators(after) == ["matmul", "add"]
    assert names(after) == ["fc@matmul", "fc", "gv"]
    want = oracle(x.astype("float64") @ w.T + (b if bias else 0), stats(7), 1)
    np.testing.assert_allclose(run(after, x), want, rtol=1e-5, atol=1e-5)


def test_fold_gives_scaled_weight_and_shift_when_golden() -> None:
    # gamma 2, beta 1, mean 3, variance 4 - epsilon: scale 1, shift -2.
    parameters = [np.full(2, v, "float32") for v in (2.0, 1.0, 3.0, 4.0 - EPSILON)]
    weight = np.arange(2 * 3 * 1 * 1, dtype="float32").reshape(2, 3, 1, 1)

    def net(fold: bool) -> tvm.IRModule:
        net = Net((1, 3, 4, 5))
        y = relax.op.nn.conv2d(net.x, relax.const(weight))
        if fold:
            y = net.emit("conv@conv2d", y)
            y = net.emit("conv", relax.op.add(y, relax.const(np.full((1, 2, 1, 1), -2, "f"))))
        else:
            y = net.emit("conv", y)
            arguments = [relax.const(p) for p in parameters]
            norm = relax.op.nn.batch_norm(y, *arguments, axis=1, epsilon=EPSILON, training=False)
            y = net.emit("bn", relax.TupleGetItem(net.emit("bn@batch_norm", norm), 0))
        return net.module(relax.op.nn.relu(y))

    expected = net(True)
    expected["main"] = expected["main"].with_attr(BATCH_NORMALIZED, ["conv"])
    assert_structural_equal(FoldBatchNorm()(net(False)), expected, map_free_vars=True)


@pytest.mark.parametrize(("axis", "folded"), [(1, True), (3, False)])
def test_fold_reads_the_output_layout_when_it_differs_from_the_input(
    axis: int, folded: bool
) -> None:
    # Two output channels and a width of two: the shapes alone would allow either axis.
    net = Net((1, 5, 2, 3))
    y = relax.op.nn.conv2d(
        net.x,
        relax.const(np.ones((2, 1, 1, 3), "float32")),
        data_layout="NHWC",
        kernel_layout="OHWI",
        out_layout="NCHW",
    )
    after = FoldBatchNorm()(net.module(net.norm(net.emit("conv", y), 2, axis)))
    assert operators(after) == ["nn.conv2d", "add" if folded else "multiply"] + ["add"] * (
        not folded
    )


def test_fold_ignores_gamma_and_beta_when_scale_and_center_are_off() -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 4, 5)).astype("float32")
    net = Net(x.shape)
    before = net.module(net.norm(net.x, 3, scale=False, center=False))
    _, _, mean, variance = stats(3)
    want = oracle(x, [np.ones(3), np.zeros(3), mean, variance], 1)
    np.testing.assert_allclose(run(FoldBatchNorm()(before), x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [1, 3])
def test_standalone_becomes_multiply_and_add_when_nothing_is_before_it(axis: int) -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 4, 5)).astype("float32")
    net = Net(x.shape)
    before = net.module(relax.op.nn.relu(net.norm(net.x, x.shape[axis], axis)))
    after = FoldBatchNorm()(before)
    assert operators(after) == ["multiply", "add", "nn.relu"]
    assert names(after) == ["bn@multiply", "bn", "gv"]
    want = np.maximum(oracle(x, stats(x.shape[axis]), axis), 0)
    # One rounding of the scale and one of the shift, both of size about 1.
    np.testing.assert_allclose(run(after, x), want, rtol=1e-5, atol=1e-6)


def test_standalone_is_computed_when_statistics_are_not_constant() -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 4, 5)).astype("float32")
    net = Net(x.shape)
    gamma, beta, _, variance = stats(3)
    mean_var = net.emit("m", relax.op.mean(net.x, axis=[0, 2, 3]))
    arguments = [relax.const(gamma), relax.const(beta), mean_var, relax.const(variance)]
    norm = relax.op.nn.batch_norm(net.x, *arguments, axis=1, epsilon=EPSILON, training=False)
    y = net.emit("bn", relax.TupleGetItem(net.emit("bn@batch_norm", norm), 0))
    after = FoldBatchNorm()(net.module(y))
    assert "nn.batch_norm" not in operators(after)
    want = oracle(x, [gamma, beta, x.mean((0, 2, 3)), variance], 1)
    np.testing.assert_allclose(run(after, x), want, rtol=1e-5, atol=1e-5)


def test_statistics_are_returned_as_they_came_when_used() -> None:
    net = Net((1, 3, 4, 5))
    parameters = [relax.const(p) for p in stats(3)]
    norm = relax.op.nn.batch_norm(net.x, *parameters, axis=1, epsilon=EPSILON, training=False)
    y = net.emit("bn@batch_norm", norm)
    after = FoldBatchNorm()(net.module(relax.TupleGetItem(y, 2)))
    np.testing.assert_array_equal(run(after, np.zeros((1, 3, 4, 5), "f")), stats(3)[3])


def conv_net(channels: int = 4) -> tuple[Net, relax.Var]:
    weight = np.random.default_rng(0).standard_normal((channels, 3, 1, 1)).astype("float32")
    net = Net((1, 3, 4, 4))
    return net, net.emit("conv", relax.op.nn.conv2d(net.x, relax.const(weight)))


def other_use() -> tvm.IRModule:
    net, y = conv_net()
    return net.module(relax.op.add(net.norm(y, 4), y))


def wrong_axis() -> tvm.IRModule:
    net, y = conv_net(channels=4)
    return net.module(net.norm(y, 4, axis=2))


def weight_not_constant() -> tvm.IRModule:
    net = Net((1, 3, 1, 1))
    weight = net.emit("w", relax.op.broadcast_to(net.x, (4, 3, 1, 1)))
    return net.module(net.norm(net.emit("conv", relax.op.nn.conv2d(net.x, weight)), 4))


def bias_not_per_channel() -> tvm.IRModule:
    net, y = conv_net()
    bias = np.arange(4, dtype="float32")  # along W, not along C
    return net.module(net.norm(net.emit("sum", relax.op.add(y, relax.const(bias))), 4))


def bias_has_other_use() -> tvm.IRModule:
    net, y = conv_net()
    y = net.emit("sum", relax.op.add(y, relax.const(np.ones((1, 4, 1, 1), "f"))))
    return net.module(relax.op.add(net.norm(y, 4), y))


def two_dynamic_summands() -> tvm.IRModule:
    net, y = conv_net()
    y = net.emit("sum", relax.op.add(y, net.emit("conv2", relax.op.nn.relu(y))))
    return net.module(net.norm(y, 4))


def activation_between() -> tvm.IRModule:
    net, y = conv_net()
    return net.module(net.norm(net.emit("relu", relax.op.nn.relu(y)), 4))


def batched_weight() -> tvm.IRModule:
    net = Net((2, 3, 5))
    weight = np.random.default_rng(0).standard_normal((2, 5, 4)).astype("float32")
    y = net.emit("mm", relax.op.matmul(net.x, relax.const(weight)))
    return net.module(net.norm(y, 4, axis=2))


def grouped_transposed() -> tvm.IRModule:
    net = Net((1, 4, 3, 3))
    weight = np.random.default_rng(0).standard_normal((4, 2, 1, 1)).astype("float32")
    y = net.emit("conv", relax.op.nn.conv2d_transpose(net.x, relax.const(weight), groups=2))
    return net.module(net.norm(y, 4))


REJECTED = [
    other_use,
    wrong_axis,
    weight_not_constant,
    bias_not_per_channel,
    bias_has_other_use,
    two_dynamic_summands,
    activation_between,
    batched_weight,
    grouped_transposed,
]


@pytest.mark.parametrize("build", REJECTED, ids=lambda build: build.__name__)
def test_batch_norm_becomes_multiply_and_add_when_it_must_not_be_folded(build: object) -> None:
    before = build()
    after = FoldBatchNorm()(before)
    expected: list[str] = []
    for operator in operators(before):
        expected += ["multiply", "add"] if operator == "nn.batch_norm" else [operator]
    assert operators(after) == expected
    x = np.random.default_rng(5).standard_normal(
        [int(d) for d in before["main"].params[0].ty.shape]
    )
    x = x.astype("float32")
    # Rounding only: the statistics are of size 1, sums are of at most 5 products.
    np.testing.assert_allclose(run(after, x), run(before, x), rtol=1e-5, atol=1e-5)


def test_batch_norm_stays_when_in_training_mode() -> None:
    net, y = conv_net()
    before = net.module(net.norm(y, 4, training=True))
    after = FoldBatchNorm()(before)
    assert_structural_equal(after, before)
    assert after["main"].same_as(before["main"])


def test_function_is_the_same_object_when_there_is_no_batch_norm() -> None:
    net, y = conv_net()
    before = net.module(y)
    assert FoldBatchNorm()(before)["main"].same_as(before["main"])


def test_names_with_dots_and_slashes_survive_when_folded() -> None:
    weight = np.ones((4, 3, 1, 1), "float32")
    net = Net((1, 3, 4, 4))
    y = net.emit("a/b.0:c", relax.op.nn.conv2d(net.x, relax.const(weight)))
    after = FoldBatchNorm()(net.module(relax.op.nn.relu(net.norm(y, 4))))
    assert names(after) == ["a/b.0:c@conv2d", "a/b.0:c", "gv"]


def test_chain_folds_when_two_batch_norms_follow_each_other() -> None:
    net, y = conv_net()
    before = net.module(net.norm(net.norm(y, 4), 4))
    after = FoldBatchNorm()(before)
    assert "nn.batch_norm" not in operators(after)
    x = np.random.default_rng(5).standard_normal((1, 3, 4, 4)).astype("float32")
    np.testing.assert_allclose(run(after, x), run(before, x), rtol=1e-5, atol=1e-5)
