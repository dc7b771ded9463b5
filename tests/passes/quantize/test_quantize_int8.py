"""What `quantize_int8` makes of networks: golden, reject and numeric tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from tvm import relax

import hone.passes.quantize.legalize  # noqa: F401  registers the lowering
from hone.errors import ModelError, UsageError
from hone.passes.apply import apply
from hone.passes.graph.dataflow import Dataflow
from hone.passes.quantize import operators
from hone.passes.quantize.integer_layer import INT32_MAX
from hone.passes.quantize.observe_tensors import STATISTICS, ObserveTensors
from hone.passes.quantize.observer import Range
from hone.passes.quantize.qparams import INT8, UINT8, PerAxis, choose_qparams, quantize
from hone.passes.quantize.quantize_int8 import (
    Quantization,
    QuantizeInt8,
    observed_tensors,
    quantize_int8,
)
from hone.passes.quantize.site import Int8Scheme, Kind

Emit = Callable[[relax.Expr, str], relax.Var]
UNIT = Range(minimum=-1.0, maximum=1.0)


def network(shape: tuple[int, ...], body: Callable[[relax.Var, Emit], relax.Expr]) -> tvm.IRModule:
    """Build ``main(x)``; the body emits named bindings and returns the last one's value."""
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x]):
        with bb.dataflow():
            value = body(x, lambda expr, name: bb.emit(expr, name))
            out = bb.emit_output(value, name_hint="y")
        bb.emit_func_output(out)
    return bb.get()


def conv(data: relax.Expr, weight: np.ndarray, **attributes: object) -> relax.Expr:
    attributes = {"data_layout": "NHWC", "kernel_layout": "OHWI", **attributes}
    return relax.op.nn.conv2d(data, relax.const(weight), **attributes)


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def run(module: tvm.IRModule, x: np.ndarray) -> list[np.ndarray]:
    vm = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    result = vm["main"](tvm.runtime.tensor(x))
    return [r.numpy() for r in result] if not hasattr(result, "numpy") else [result.numpy()]


def ranges(module: tvm.IRModule, x: np.ndarray) -> dict[str, Range]:
    """Observe one input."""
    names = observed_tensors(module)
    results = run(apply(module, ObserveTensors(tensors=names)), x)
    return {
        name: Range(
            minimum=float(results[STATISTICS * i].min()),
            maximum=float(results[STATISTICS * i + 1].max()),
        )
        for i, name in enumerate(names)
    }


def ops(module: tvm.IRModule) -> list[str]:
    """Return the operators of ``main`` in order."""
    values = [b.value for b in Dataflow(module["main"]).bindings]
    return [str(v.op.name) for v in values if isinstance(v, relax.Call)]


def float32_bindings(module: tvm.IRModule) -> list[str]:
    bindings = Dataflow(module["main"]).bindings
    return [str(b.var.name) for b in bindings if str(b.var.ty.dtype) == "float32"]


def whole(module: tvm.IRModule, *names: str, **options: object) -> Quantization:
    given = names or observed_tensors(module)
    return quantize_int8(module, dict.fromkeys(given, UNIT), **options)


W1, B1 = weights(8, 3, 3, 3, seed=1), weights(8, seed=2) * 0.3
W2, B2 = weights(8, 3, 3, 8, seed=3), weights(8, seed=4) * 0.3
W3, B3 = weights(8, 5, seed=5), weights(5, seed=6)
SHAPE = (2, 6, 8, 3)


def residual_network(x: relax.Var, emit: Emit) -> relax.Expr:
    """Two convolutions with a residual, a mean and a classifier: every kind of chain."""
    a = emit(conv(x, W1, padding=(1, 1)), "conv1_conv2d")
    a = emit(relax.op.add(a, relax.const(B1.reshape(1, 1, 1, 8))), "conv1")
    a = emit(relax.op.nn.relu(a), "relu1")
    p = emit(relax.op.nn.max_pool2d(a, (2, 2), (2, 2), layout="NHWC"), "pool1")
    a = emit(conv(p, W2, padding=(1, 1)), "conv2_conv2d")
    a = emit(relax.op.add(a, relax.const(B2)), "conv2")
    a = emit(relax.op.add(p, a), "add1")
    a = emit(relax.op.nn.relu(a), "relu2")
    a = emit(relax.op.mean(a, [1, 2], keepdims=True), "gap")
    a = emit(relax.op.permute_dims(a, [0, 3, 1, 2]), "nchw")
    a = emit(relax.op.reshape(a, (2, 8)), "flat")
    a = emit(relax.op.matmul(a, relax.const(W3)), "fc_matmul")
    return relax.op.add(a, relax.const(B3))


def test_conv_bias_relu_becomes_one_operator_with_the_expected_constants() -> None:
    weight = np.array([[0.5, -1.0], [0.25, 0.25], [0.0, 0.0]], np.float32).reshape(3, 1, 1, 2)
    bias = np.array([0.1, -0.2, 0.0], np.float32)

    def before(x: relax.Var, emit: Emit) -> relax.Expr:
        a = emit(conv(x, weight, strides=(2, 1), padding=(0, 1, 0, 1)), "conv1_conv2d")
        a = emit(relax.op.add(a, relax.const(bias.reshape(1, 1, 1, 3))), "conv1")
        a = emit(relax.op.nn.relu(a), "relu1")
        return relax.op.nn.conv2d(
            a,
            relax.const(weights(1, 1, 1, 3)),
            data_layout="NHWC",
            kernel_layout="OHWI",
        )

    module = network((1, 4, 5, 2), before)
    # 2.55 / 255 and 5.1 / 255: round scales, zero points 100 and 0.
    seen = {"x": Range(minimum=-1.0, maximum=1.55), "relu1": Range(minimum=0.0, maximum=5.1)}
    after = quantize_int8(module, seen).module
    x_scale, out_scale = np.float32(2.55 / 255), np.float32(5.1 / 255)
    w_scale = np.array([1.0, 0.25, 127.0], np.float64) / 127
    step = float(x_scale) * w_scale.astype(np.float32)
    levels = np.array([[64, -127], [127, 127], [0, 0]], np.int8)
    bias_levels = np.rint(bias / step).astype(np.int32) - 100 * levels.astype(np.int32).sum(1)
    last = weights(1, 1, 1, 3)
    last_scale = np.abs(last).max() / 127
    last_levels = quantize(
        last,
        choose_qparams(
            last.min((1, 2, 3)),
            last.max((1, 2, 3)),
            type=INT8,
            symmetric=True,
            granularity=PerAxis(axis=0),
        ),
    )

    def expected(x: relax.Var, emit: Emit) -> relax.Expr:
        a = operators.quantize(x, relax.const(x_scale), relax.const(np.int32(100)))
        a = emit(a, "x_quantize")
        a = operators.conv2d_int8(
            a,
            relax.const(levels.reshape(3, 1, 1, 2)),
            relax.const(bias_levels.astype(np.int32)),
            relax.const((step / float(out_scale)).astype(np.float32)),
            relax.const(np.array([100, 0, 0, 255], np.int32)),
            strides=(2, 1),
            padding=(0, 1, 0, 1),
        )
        a = emit(a, "conv1")
        return operators.conv2d_int8(
            a,
            relax.const(last_levels),
            relax.const(np.zeros(1, np.int32)),
            relax.const(np.array([float(out_scale) * np.float32(last_scale)], np.float32)),
            relax.const(np.array([0], np.int32)),
            out_dtype="float32",
        )

    tvm.ir.assert_structural_equal(after, network((1, 4, 5, 2), expected))


def test_network_is_integers_from_first_to_last_operator() -> None:
    module = network(SHAPE, residual_network)
    result = whole(module)
    assert ops(result.module) == [
        "hone.quantize",
        "hone.conv2d_int8",
        "relax.nn.max_pool2d",
        "hone.conv2d_int8",
        "hone.mean_int8",
        "relax.permute_dims",
        "relax.reshape",
        "hone.dense_int8",
    ]
    assert float32_bindings(result.module) == ["y"]
    assert result.conversions == ("x@quantize",)
    assert result.skipped == ()
    assert [(q.layer, q.kind, q.layers, q.output) for q in result.quantized] == [
        ("conv1_conv2d", Kind.CONV2D, ("conv1_conv2d", "conv1", "relu1"), "uint8"),
        ("conv2_conv2d", Kind.CONV2D, ("conv2_conv2d", "conv2", "add1", "relu2"), "uint8"),
        ("gap", Kind.MEAN, ("gap",), "uint8"),
        ("fc_matmul", Kind.DENSE, ("fc_matmul", "y"), "float32"),
    ]


def test_pass_gives_the_same_module_and_leaves_its_input_alone() -> None:
    module = network(SHAPE, residual_network)
    copy = tvm.ir.load_json(tvm.ir.save_json(module))
    seen = dict.fromkeys(observed_tensors(module), UNIT)
    after = apply(module, QuantizeInt8(ranges=seen))
    tvm.ir.assert_structural_equal(after, quantize_int8(module, seen).module)
    tvm.ir.assert_structural_equal(module, copy)
    relax.analysis.well_formed(after)


def error_bound(seen: dict[str, Range]) -> float:
    """Bound ``|int8 - float|`` of `residual_network` on the data that its ranges come from.

    Through a layer ``y = W x + b`` an input error e grows to at most ``max_k Σ|w_k| e``; rounding
    the weights adds ``scale_k / 2`` for each of the n inputs, each at most the range's end; the
    bias adds half an accumulator step. Writing a tensor adds half a step, a residual 2**-8 more.
    ReLU, max pooling, averaging and clipping to a range that holds the true value grow nothing.
    """

    def step(name: str) -> float:
        value = seen[name]
        return float(
            choose_qparams(value.minimum, value.maximum, type=UINT8, symmetric=False).scale
        )

    def top(name: str) -> float:
        return max(abs(seen[name].minimum), abs(seen[name].maximum))

    def layer(weight: np.ndarray, error: float, source: str) -> float:
        flat = np.abs(weight.reshape(len(weight), -1)).astype(np.float64)
        scale = flat.max(1) / 127
        grown = flat.sum(1) * error + scale / 2 * flat.shape[1] * (top(source) + error)
        return float((grown + step(source) * scale / 2).max())

    # The input's zero point is rounded: up to a whole step at one end of its range.
    pool = layer(W1, step("x"), "x") + step("relu1") / 2
    add = layer(W2, pool, "relu1") + pool + step("relu2") * (0.5 + 2**-8)
    mean = add + step("gap") / 2
    return layer(W3.T, mean, "gap")


@dataclass(frozen=True, kw_only=True)
class Measured:
    module: tvm.IRModule
    x: np.ndarray
    ranges: dict[str, Range]
    want: np.ndarray


@pytest.fixture(scope="module")
def measured() -> Measured:
    """`residual_network` in float, observed on one batch."""
    module = network(SHAPE, residual_network)
    x = np.random.default_rng(7).normal(size=SHAPE).astype(np.float32)
    return Measured(module=module, x=x, ranges=ranges(module, x), want=run(module, x)[0])


def test_network_differs_from_float_by_no_more_than_the_derived_bound(measured: Measured) -> None:
    seen, want = measured.ranges, measured.want
    (got,) = run(quantize_int8(measured.module, seen).module, measured.x)
    error, bound = np.abs(got - want).max(), error_bound(seen)
    assert 0 < error <= bound
    # The bound adds up worst cases; typical errors average out. The signal is far larger.
    assert error < 0.05 * np.abs(want).max()


def test_bound_is_exceeded_when_the_ranges_are_wrong(measured: Measured) -> None:
    wrong = {
        n: Range(minimum=r.minimum / 20, maximum=r.maximum / 20) for n, r in measured.ranges.items()
    }
    (got,) = run(quantize_int8(measured.module, wrong).module, measured.x)
    assert np.abs(got - measured.want).max() > error_bound(wrong)


def test_int8_constants_are_int8_when_lowered_and_folded() -> None:
    module = whole(network(SHAPE, residual_network)).module
    lowered = apply(
        module, relax.transform.LegalizeOps(), relax.transform.FoldConstant(),
        relax.transform.DeadCodeElimination(),
    )  # fmt: skip
    found: list[tuple[str, int]] = []

    def visit(node: object) -> None:
        if isinstance(node, tvm.ir.GenericConst):
            found.append((str(node.ty.dtype), int(np.prod([int(e) for e in node.ty.shape]))))

    relax.analysis.post_order_visit(lowered["main"], visit)
    by_type = {t: sum(n for dtype, n in found if dtype == t) for t in {t for t, _ in found}}
    # Packed to tiles of 16 channels: 16·27, 16·72 and 16·8.
    assert by_type["int8"] == 16 * (27 + 72 + 8)
    # Multipliers of 8 + 8 + 5 channels, those of residual and mean, one scale: no weight.
    assert by_type["float32"] == 8 + 8 + 5 + 1 + 1 + 1
    assert set(by_type) == {"int8", "int32", "float32"}


def test_relu6_tightens_the_levels_when_the_range_is_wider() -> None:
    weight = weights(2, 1, 1, 3)

    def body(x: relax.Var, emit: Emit) -> relax.Expr:
        a = emit(conv(x, weight), "conv1")
        a = emit(relax.op.nn.relu(a), "relu")
        a = emit(relax.op.minimum(a, relax.const(6.0, "float32")), "relu6")
        return conv(a, weights(1, 1, 1, 2))

    module = network((1, 2, 2, 3), body)
    seen = {"x": UNIT, "relu6": Range(minimum=-2.0, maximum=10.75)}
    call = Dataflow(quantize_int8(module, seen).module["main"]).bindings[1].value
    # scale 12.75 / 255 = 0.05, zero point 40: 0 is level 40, 6 is level 160.
    assert call.args[4].value.numpy().tolist()[1:] == [40, 40, 160]


@pytest.mark.parametrize(
    "clip",
    [
        lambda a: relax.op.clip(a, 0, 6),
        lambda a: relax.op.minimum(relax.op.nn.relu(a), relax.const(6.0, "float32")),
        lambda a: relax.op.maximum(relax.const(0.0, "float32"), a),
    ],
    ids=["clip", "minimum_of_relu", "maximum"],
)
def test_activation_is_absorbed_when_it_only_clips(clip: Callable) -> None:
    def body(x: relax.Var, emit: Emit) -> relax.Expr:
        a = emit(conv(x, weights(2, 1, 1, 3)), "conv1")
        return conv(emit(clip(a), "act"), weights(1, 1, 1, 2))

    assert ops(whole(network((1, 2, 2, 3), body)).module) == [
        "hone.quantize",
        "hone.conv2d_int8",
        "hone.conv2d_int8",
    ]


def test_float_operator_between_gets_conversions_on_both_sides() -> None:
    def body(x: relax.Var, emit: Emit) -> relax.Expr:
        a = emit(conv(x, weights(2, 1, 1, 3)), "conv1")
        a = emit(relax.op.nn.softmax(a), "softmax1")
        return conv(a, weights(1, 1, 1, 2))

    result = whole(network((1, 2, 2, 3), body))
    assert ops(result.module) == [
        "hone.quantize",
        "hone.conv2d_int8",
        "relax.nn.softmax",
        "hone.quantize",
        "hone.conv2d_int8",
    ]
    assert result.conversions == ("x@quantize", "softmax1@quantize")


def test_tensor_is_converted_once_when_several_read_it() -> None:
    def body(x: relax.Var, emit: Emit) -> relax.Expr:
        a = emit(conv(x, weights(2, 1, 1, 3, seed=1)), "left")
        b = emit(conv(x, weights(2, 1, 1, 3, seed=2)), "right")
        c = emit(conv(a, weights(2, 1, 1, 2, seed=3)), "next")
        s = emit(relax.op.sigmoid(a), "sigmoid_a")
        t = emit(relax.op.tanh(a), "tanh_a")
        return relax.op.add(relax.op.add(relax.op.multiply(s, t), b), c)

    module = network((1, 2, 2, 3), body)
    x = np.random.default_rng(1).normal(size=(1, 2, 2, 3)).astype(np.float32)
    result = quantize_int8(module, ranges(module, x))
    assert ops(result.module).count("hone.quantize") == 1
    assert ops(result.module).count("hone.dequantize") == 1
    assert result.conversions == ("x@quantize", "left")
    (want,), (got,) = run(module, x), run(result.module, x)
    # Three layers of 1 % steps each.
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_result_that_is_also_returned_stays_float_for_the_caller() -> None:
    def body(x: relax.Var, emit: Emit) -> relax.Expr:
        a = emit(conv(x, weights(2, 1, 1, 3)), "conv1")
        b = emit(conv(a, weights(1, 1, 1, 2)), "conv2")
        return relax.Tuple([a, b])

    module = network((1, 2, 2, 3), body)
    after = whole(module).module
    assert [str(t.dtype) for t in after["main"].ret_ty.fields] == ["float32", "float32"]
    assert ops(after).count("hone.dequantize") == 1


def test_residual_is_merged_into_the_later_convolution_when_both_branches_have_one() -> None:
    def body(x: relax.Var, emit: Emit) -> relax.Expr:
        a = emit(conv(x, weights(2, 1, 1, 3, seed=1)), "main1")
        b = emit(conv(x, weights(2, 1, 1, 3, seed=2)), "shortcut")
        a = emit(conv(a, weights(2, 1, 1, 2, seed=3)), "main2")
        a = emit(relax.op.add(a, b), "add1")
        return conv(a, weights(1, 1, 1, 2))

    result = whole(network((1, 2, 2, 3), body))
    assert {q.layer: q.layers for q in result.quantized} == {
        "main1": ("main1",),
        "shortcut": ("shortcut",),
        "main2": ("main2", "add1"),
        "y": ("y",),
    }


def test_addition_is_its_own_operator_when_no_convolution_can_compute_it() -> None:
    def body(x: relax.Var, emit: Emit) -> relax.Expr:
        a = emit(relax.op.nn.relu(emit(conv(x, weights(2, 1, 1, 3)), "conv1")), "relu1")
        p = relax.op.nn.max_pool2d(a, (3, 3), padding=(1, 1), layout="NHWC")
        a = emit(relax.op.add(emit(p, "pool1"), a), "add1")
        return conv(emit(relax.op.nn.relu(a), "relu2"), weights(1, 1, 1, 2))

    module = network((1, 3, 4, 3), body)
    x = np.random.default_rng(2).normal(size=(1, 3, 4, 3)).astype(np.float32)
    result = quantize_int8(module, ranges(module, x))
    assert "hone.add_int8" in ops(result.module)
    assert float32_bindings(result.module) == ["y"]
    (want,), (got,) = run(module, x), run(result.module, x)
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_doubled_tensor_is_added_as_levels() -> None:
    def body(x: relax.Var, emit: Emit) -> relax.Expr:
        a = emit(conv(x, weights(2, 1, 1, 3)), "conv1")
        return conv(emit(relax.op.add(a, a), "twice"), weights(1, 1, 1, 2))

    result = whole(network((1, 2, 2, 3), body))
    assert ops(result.module)[2] == "hone.add_int8"


def test_addition_stays_float_when_an_operand_is_float() -> None:
    def body(x: relax.Var, emit: Emit) -> relax.Expr:
        a = emit(conv(x, weights(3, 1, 1, 3)), "conv1")
        a = emit(relax.op.add(a, x), "add1")
        return conv(a, weights(1, 1, 1, 3))

    result = whole(network((1, 2, 2, 3), body))
    assert ops(result.module)[1:3] == ["hone.conv2d_int8", "relax.add"]


def test_average_pooling_is_integer_when_every_window_counts_alike() -> None:
    def body(include: bool) -> Callable[[relax.Var, Emit], relax.Expr]:
        def inner(x: relax.Var, emit: Emit) -> relax.Expr:
            a = emit(conv(x, weights(2, 1, 1, 3)), "conv1")
            a = relax.op.nn.avg_pool2d(
                a, (2, 2), padding=(1, 1), layout="NHWC", count_include_pad=include
            )
            return conv(emit(a, "pool1"), weights(1, 1, 1, 2))

        return inner

    assert "hone.avg_pool2d_int8" in ops(whole(network((1, 3, 3, 3), body(True))).module)
    assert "relax.nn.avg_pool2d" in ops(whole(network((1, 3, 3, 3), body(False))).module)


def test_product_of_three_axes_is_integer_and_of_two_activations_is_not() -> None:
    def body(x: relax.Var, emit: Emit) -> relax.Expr:
        q = emit(relax.op.matmul(x, relax.const(weights(4, 6, seed=1))), "query")
        k = emit(relax.op.matmul(x, relax.const(weights(4, 6, seed=2))), "key")
        t = emit(relax.op.permute_dims(k, [0, 2, 1]), "key_t")
        return relax.op.matmul(q, t)

    module = network((2, 3, 4), body)
    x = np.random.default_rng(3).normal(size=(2, 3, 4)).astype(np.float32)
    result = quantize_int8(module, ranges(module, x))
    assert ops(result.module) == [
        "hone.quantize",
        "hone.dense_int8",
        "hone.dense_int8",
        "relax.permute_dims",
        "relax.matmul",
    ]
    assert result.skipped == (("y", "both sides are activations"),)
    (want,), (got,) = run(module, x), run(result.module, x)
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def unchanged(module: tvm.IRModule, layer: str, reason: str) -> None:
    result = whole(module)
    assert result.skipped == ((layer, reason),)
    assert result.quantized == ()
    tvm.ir.assert_structural_equal(result.module, module)


def test_convolution_stays_float_when_its_layout_is_nchw() -> None:
    module = network(
        (1, 3, 4, 4), lambda x, _: relax.op.nn.conv2d(x, relax.const(weights(2, 3, 1, 1)))
    )
    unchanged(module, "y", "the layout is NCHW OIHW NCHW, not NHWC OHWI NHWC")


def skewed(*shape: int) -> np.ndarray:
    """Weights that lie mostly on one side, as those behind a folded normalization can."""
    return (np.random.default_rng(4).random(shape) - 0.1).astype(np.float32)


@pytest.mark.parametrize("depthwise", [False, True])
def test_asymmetric_weights_are_nearer_when_they_lie_on_one_side(depthwise: bool) -> None:
    weight, groups = skewed(6, 3, 3, 1 if depthwise else 6), 6 if depthwise else 1
    module = network((1, 7, 5, 6), lambda x, _: conv(x, weight, groups=groups))
    x = np.random.default_rng(1).normal(size=(1, 7, 5, 6)).astype(np.float32)
    seen = ranges(module, x)
    (want,) = run(module, x)
    errors = {}
    for symmetric in (True, False):
        result = quantize_int8(module, seen, scheme=Int8Scheme(symmetric=symmetric))
        (got,) = run(result.module, x)
        errors[symmetric] = float(np.square(got - want).sum())
        sums = [name for name in ops(result.module) if name.endswith("_sums")]
        assert bool(sums) is not (symmetric or depthwise)
    assert errors[False] < errors[True]


def test_scales_of_powers_of_two_make_requantization_a_shift() -> None:
    def body(x: relax.Var, emit: Emit) -> relax.Expr:
        a = emit(relax.op.nn.relu(emit(conv(x, weights(8, 3, 3, 3)), "a")), "relu")
        return conv(a, weights(4, 1, 1, 8))

    module = network((1, 6, 6, 3), body)
    x = np.random.default_rng(1).normal(size=(1, 6, 6, 3)).astype(np.float32)
    scheme = Int8Scheme(power_of_two=True)
    result = quantize_int8(module, ranges(module, x), scheme=scheme)
    first, second = (
        b.value
        for b in Dataflow(result.module["main"]).bindings
        if isinstance(b.value, relax.Call) and str(b.value.op.name) == "hone.conv2d_int8"
    )
    for call in (first, second):
        mantissa, _ = np.frexp(call.args[3].value.numpy())
        assert set(mantissa.tolist()) == {0.5}
    # The sums of the first one, shifted: half to even.
    sums = np.random.default_rng(2).integers(-(2**23), 2**23, 5000)
    for factor in np.unique(first.args[3].value.numpy()):
        shift = -int(np.log2(factor))
        low, rest = sums >> shift, sums & (2**shift - 1)
        half = 2 ** (shift - 1)
        shifted = low + ((rest > half) | ((rest == half) & (low % 2 == 1)))
        np.testing.assert_array_equal(np.rint(sums.astype(np.float32) * factor), shifted)
    (want,), (got,) = run(module, x), run(result.module, x)
    assert np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("channels", "filters", "groups"), [(4, 4, 2), (2, 4, 2), (48, 48, 3)], ids=str
)
def test_convolution_of_groups_is_cut_into_convolutions(
    channels: int, filters: int, groups: int
) -> None:
    weight = weights(filters, 3, 2, channels // groups)
    module = network((2, 5, 4, channels), lambda x, _: conv(x, weight, groups=groups))
    result = whole(module)
    assert result.skipped == ()
    parts = 3 if groups == 3 else 1
    assert ops(result.module).count("hone.conv2d_int8") == parts
    x = np.random.default_rng(1).uniform(-1, 1, (2, 5, 4, channels)).astype(np.float32)
    (want,), (got,) = run(module, x), run(result.module, x)
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_convolution_stays_float_when_its_weight_is_computed() -> None:
    def body(x: relax.Var, emit: Emit) -> relax.Expr:
        w = emit(relax.op.reshape(x, (4, 1, 1, 4)), "w")
        return relax.op.nn.conv2d(x, w, data_layout="NHWC", kernel_layout="OHWI")

    unchanged(network((1, 2, 2, 4), body), "y", "the weights are not constant")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_convolution_stays_float_when_its_weights_are_not_finite(bad: float) -> None:
    weight = weights(2, 1, 1, 3)
    weight[0, 0, 0, 0] = bad
    module = network((1, 2, 2, 3), lambda x, _: conv(x, weight))
    result = whole(module)
    assert result.skipped == (("y", "the weights hold NaN or infinity"),)
    assert ops(result.module) == ["relax.nn.conv2d"]


def test_layer_stays_float_when_its_sums_could_leave_int32() -> None:
    # 70 000 × 127 × 255 = 2.27e9; 66 000 × 127 × 255 = 2.14e9 still fits.
    for depth, fits in ((70_000, False), (66_000, True)):
        weight = np.ones((depth, 1), np.float32)
        module = network((1, depth), lambda x, _, w=weight: relax.op.matmul(x, relax.const(w)))
        result = quantize_int8(module, {"x": Range(minimum=0.0, maximum=1.0)})
        assert bool(result.quantized) is fits
        if not fits:
            assert result.skipped == (
                (
                    "y",
                    "its sums could reach 2.27e+09 in channel 0, which int32 cannot hold "
                    f"({INT32_MAX:.3g})",
                ),
            )
            assert ops(result.module) == ["relax.matmul"]


def test_neighbours_stay_integer_when_a_layer_in_the_middle_is_refused() -> None:
    depth = 70_000

    def body(x: relax.Var, emit: Emit) -> relax.Expr:
        a = emit(relax.op.matmul(x, relax.const(np.ones((2, depth), np.float32))), "first")
        a = emit(relax.op.matmul(a, relax.const(np.ones((depth, 3), np.float32))), "middle")
        return relax.op.matmul(a, relax.const(weights(3, 2)))

    result = whole(network((1, 2), body), "x", "first", "middle")
    assert [q.layer for q in result.quantized] == ["first", "y"]
    assert [s.layer for s in result.skipped] == ["middle"]
    assert ops(result.module) == [
        "hone.quantize",
        "hone.dense_int8",
        "relax.matmul",
        "hone.quantize",
        "hone.dense_int8",
    ]


def test_bias_survives_when_the_weights_of_its_channel_are_zero_or_tiny() -> None:
    weight = np.array([[0.0, 1e-12, 0.5], [0.0, -1e-12, 0.25]], np.float32)
    bias = np.array([0.7, -0.3, 0.1], np.float32)

    def body(x: relax.Var, emit: Emit) -> relax.Expr:
        return relax.op.add(emit(relax.op.matmul(x, relax.const(weight)), "fc"), relax.const(bias))

    module = network((4, 2), body)
    x = np.random.default_rng(5).uniform(-1, 1, (4, 2)).astype(np.float32)
    result = quantize_int8(module, ranges(module, x))
    assert len(result.quantized) == 1
    (want,), (got,) = run(module, x), run(result.module, x)
    np.testing.assert_allclose(got[:, :2], want[:, :2], atol=1e-6)
    assert np.abs(got - want).max() < 0.01


def test_layers_stay_float_when_asked_for() -> None:
    module = network(SHAPE, residual_network)
    result = whole(module, keep_float=["conv1"])
    assert result.skipped == (("conv1_conv2d", "kept in float by request"),)
    assert ops(result.module)[:5] == [
        "relax.nn.conv2d",
        "relax.add",
        "relax.nn.relu",
        "relax.nn.max_pool2d",
        "hone.quantize",
    ]


def test_pooling_stays_float_when_asked_for() -> None:
    module = network(SHAPE, residual_network)
    after = whole(module, keep_float=["pool1"]).module
    assert ops(after)[1:5] == [
        "hone.conv2d_int8",
        "relax.nn.relu",
        "relax.nn.max_pool2d",
        "hone.quantize",
    ]


def test_error_names_the_nearest_layer_when_one_to_keep_does_not_exist() -> None:
    module = network(SHAPE, residual_network)
    with pytest.raises(UsageError) as error:
        whole(module, keep_float=["conv3", "pool1"])
    assert str(error.value) == "no such layer to keep in float: 'conv3', did you mean 'conv2'?"


def test_error_lists_every_tensor_when_ranges_are_missing() -> None:
    module = network(SHAPE, residual_network)
    names = observed_tensors(module)
    assert names == ("x", "relu1", "pool1", "conv2", "relu2", "gap", "nchw", "flat")
    with pytest.raises(ModelError) as error:
        quantize_int8(module, dict.fromkeys(names[2:], UNIT))
    assert str(error.value) == (
        "calibration gave no range for some tensors\n  - x\n  - relu1\n"
        "  hint: calibrate the very module that is quantized"
    )


def test_error_names_the_tensor_when_a_range_is_not_finite() -> None:
    module = network(SHAPE, residual_network)
    seen = dict.fromkeys(observed_tensors(module), UNIT)
    seen["relu2"] = Range(minimum=0.0, maximum=math.inf)
    with pytest.raises(ModelError) as error:
        quantize_int8(module, seen)
    assert str(error.value) == ("relu2: a quantization range must be finite, but it is [0, inf]")


def test_relu_works_on_levels_when_nothing_absorbs_it() -> None:
    def body(x: relax.Var, emit: Emit) -> relax.Expr:
        a = emit(conv(x, weights(2, 1, 1, 3)), "conv1")
        a = emit(relax.op.nn.max_pool2d(a, (2, 2), layout="NHWC"), "pool1")
        return conv(emit(relax.op.nn.relu(a), "relu1"), weights(1, 1, 1, 2))

    module = network((1, 3, 4, 3), body)
    x = np.random.default_rng(4).normal(size=(1, 3, 4, 3)).astype(np.float32)
    seen = ranges(module, x)
    result = quantize_int8(module, seen)
    assert ops(result.module)[1:4] == ["hone.conv2d_int8", "relax.nn.max_pool2d", "relax.maximum"]
    zero = Dataflow(result.module["main"]).bindings[3].value.args[1]
    conv1 = seen["conv1"]
    levels = choose_qparams(conv1.minimum, conv1.maximum, type=UINT8, symmetric=False)
    assert zero.value.numpy() == levels.zero_point
    assert zero.value.numpy().dtype == np.uint8
    (want,), (got,) = run(module, x), run(result.module, x)
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
