"""QDQ patterns become integer operators with the model's levels; what does not fit stays float."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tvm
from onnx import helper, numpy_helper
from tvm import relax

from hone import importer, pipeline
from hone.passes.graph.dataflow import Dataflow
from hone.passes.quantize.match_qdq import is_qdq, match_qdq
from hone.passes.quantize.quantize_int8 import Quantization
from hone.targets.target import resolve

TARGET = resolve("host")
RESIZE = tvm.ir.Op.get("relax.image.resize2d")


class Net:
    """Writes a QDQ model node by node; ``q`` and ``dq`` return names as an exporter would."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.rng = np.random.default_rng(seed)

    def input(self, *shape: int, dtype: str = "float32") -> str:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def const(self, value: Any, dtype: Any = None) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(self, op: str, *inputs: str, domain: str = "", **attrs: Any) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op, list(inputs), [f"{name}_out"], name=name, domain=domain, **attrs)
        )
        return f"{name}_out"

    def q(self, x: str, scale: float, zero: int, dtype: str = "uint8") -> str:
        return self.node(
            "QuantizeLinear", x, self.const(scale, np.float32), self.const(zero, dtype)
        )

    def dq(self, x: str, scale: Any, zero: Any, dtype: str = "uint8", **attrs: Any) -> str:
        return self.node(
            "DequantizeLinear", x, self.const(scale, np.float32), self.const(zero, dtype), **attrs
        )

    def qdq(self, x: str, scale: float, zero: int, dtype: str = "uint8") -> str:
        return self.dq(self.q(x, scale, zero, dtype), scale, zero, dtype)

    def weight(self, *shape: int, axis: int | None = 0, dtype: str = "int8", zero: int = 0) -> str:
        info = np.iinfo(dtype)
        levels = self.rng.integers(info.min, info.max + 1, shape)
        if axis is None:
            return self.dq(self.const(levels, dtype), 0.01, zero, dtype)
        scale = self.rng.uniform(0.005, 0.02, shape[axis])
        zeros = np.full(shape[axis], zero)
        return self.dq(self.const(levels, dtype), scale, zeros, dtype, axis=axis)

    def bias(self, channels: int) -> str:
        return self.const(self.rng.standard_normal(channels), np.float32)

    def model(self, *outputs: str, opset: int = 17) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "net", self.inputs, [onnx.ValueInfoProto(name=o) for o in outputs],
            self.constants,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return onnx.shape_inference.infer_shapes(model)

    def feeds(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(7)
        feeds = {}
        for value in self.inputs:
            tensor = value.type.tensor_type
            shape = [d.dim_value for d in tensor.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            if dtype.kind == "f":
                feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
            else:
                info = np.iinfo(dtype)
                feeds[value.name] = rng.integers(info.min, info.max + 1, shape, dtype)
        return feeds


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    imported = importer.load(model)
    lowered = pipeline.lower(imported.module, TARGET, threads=1)
    scheduled = pipeline.schedule(lowered, TARGET, threads=1).module
    vm = relax.VirtualMachine(pipeline.build_executable(scheduled, TARGET, threads=1), tvm.cpu())
    result = vm["main"](*[tvm.runtime.tensor(feeds[s.name]) for s in imported.signature.inputs])
    results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
    return [r.numpy() for r in results]


def reference(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    return session.run(None, dict(feeds))


def check(
    net: Net, *outputs: str, level: float = 1.0, share: float = 0.01, opset: int = 17
) -> Quantization:
    """Compare with onnxruntime: nearly everywhere equal, nowhere off by more than a level."""
    model = net.model(*outputs, opset=opset)
    feeds = net.feeds()
    given, expected = run(model, feeds), reference(model, feeds)
    for a, b in zip(given, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert len(np.unique(b)) > 2
        distance = np.abs(a.astype(np.float64) - b)
        assert distance.max() <= level * 1.001
        assert np.mean(distance > 1e-4 * level) <= share
    return match_qdq(importer.load(model).module)


def kinds(result: Quantization) -> list[str]:
    return [str(layer.kind) for layer in result.quantized]


def floats(result: Quantization) -> list[str]:
    """Operators that compute in float32."""
    return [
        str(b.value.op.name)
        for b in Dataflow(result.module["main"]).bindings
        if isinstance(b.value, relax.Call) and str(b.var.ty.dtype) == "float32"
    ]


@pytest.mark.parametrize("weights", ["int8", "uint8"])
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize(("dtype", "zero"), [("uint8", 121), ("int8", -7)])
def test_convolution_is_integer_when_quantized(dtype, zero, axis, weights):
    net = Net()
    x = net.qdq(net.input(1, 5, 9, 8), 0.02, zero, dtype)
    w = net.weight(6, 5, 3, 3, axis=axis, dtype=weights, zero=128 if weights == "uint8" else 0)
    y = net.node("Conv", x, w, net.bias(6), pads=[1, 0, 1, 2], strides=[2, 1])
    result = check(net, net.qdq(y, 0.05, zero, dtype), level=0.05)
    assert kinds(result) == ["conv2d"]
    assert result.skipped == ()
    assert floats(result) == ["hone.dequantize"]


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize(("weights", "zero"), [("uint8", 30), ("int8", -128), ("uint8", 255)])
def test_layers_whose_weights_have_a_zero_point_are_integer(weights, zero, axis):
    net = Net()
    x = net.qdq(net.input(1, 5, 9, 8), 0.02, 121)
    w = net.weight(6, 5, 3, 3, axis=axis, dtype=weights, zero=zero)
    y = net.node("Conv", x, w, net.bias(6), pads=[1, 0, 1, 2], strides=[2, 1])
    y = net.qdq(y, 0.2, 90)
    w = net.weight(6, 1, 3, 3, axis=axis, dtype=weights, zero=zero)
    y = net.qdq(net.node("Conv", y, w, net.bias(6), group=6), 2.0, 121)
    y = net.node("Reshape", y, net.const([6, 18], np.int64))
    w = net.weight(18, 7, axis=None if axis is None else 1, dtype=weights, zero=zero)
    y = net.node("Add", net.node("MatMul", y, w), net.bias(7))
    result = check(net, net.qdq(y, 200.0, 128), level=200.0)
    assert kinds(result) == ["conv2d", "conv2d", "dense"]
    assert result.skipped == ()
    assert floats(result) == ["hone.dequantize"]


@pytest.mark.parametrize(("groups", "channels"), [(4, 4), (1, 4)])
def test_depthwise_and_dilated_convolutions_are_integer(groups, channels):
    net = Net()
    x = net.qdq(net.input(1, 4, 9, 9), 0.02, 128)
    w = net.weight(channels, 4 // groups, 3, 3)
    y = net.node("Conv", x, w, group=groups, dilations=[2, 2])
    result = check(net, net.qdq(y, 0.03, 128), level=0.03)
    assert (kinds(result), result.skipped) == (["conv2d"], ())


@pytest.mark.parametrize(
    ("activation", "bounds"), [("Relu", ()), ("Clip", (0.0, 6.0)), ("Clip", (-1.3, 2.2))]
)
def test_activation_joins_the_convolution_before_it(activation, bounds):
    net = Net()
    x = net.qdq(net.input(1, 4, 6, 6), 0.02, 128)
    y = net.node("Conv", x, net.weight(8, 4, 3, 3))
    y = net.node(activation, y, *(net.const(b, np.float32) for b in bounds))
    result = check(net, net.qdq(y, 0.05, 128), level=0.05)
    assert kinds(result) == ["conv2d"]
    assert floats(result) == ["hone.dequantize"]


@pytest.mark.parametrize("quantized", [True, False])
def test_constant_added_behind_an_activation_stays_behind_it(quantized):
    net = Net()
    x = net.qdq(net.input(1, 4, 6, 6), 0.02, 128)
    y = net.node("Relu", net.node("Conv", x, net.weight(8, 4, 3, 3), net.bias(8)))
    y = net.node("Add", y, net.const(-0.5, np.float32))
    if quantized:
        result = check(net, net.qdq(y, 0.05, 128), level=0.05)
    else:
        result = check(net, y, level=2e-4, share=1)  # half a step of the bias
    assert kinds(result) == ["conv2d"]


def test_residual_joins_the_convolution_when_nothing_is_rounded_between():
    net = Net()
    x = net.qdq(net.input(1, 4, 6, 6), 0.02, 128)
    y = net.node("Conv", x, net.weight(4, 4, 3, 3), net.bias(4), pads=[1, 1, 1, 1])
    y = net.node("Relu", net.node("Add", x, y))
    result = check(net, net.qdq(y, 0.05, 0), level=0.05, share=0.03)
    assert kinds(result) == ["conv2d"]
    assert result.quantized[0].layers == ("conv3", "add4", "relu5")
    assert floats(result) == ["hone.dequantize"]


def test_block_of_a_residual_network_is_integer_from_end_to_end():
    net = Net()
    x = net.qdq(net.input(1, 3, 16, 16), 0.02, 128)
    a = net.qdq(net.node("Conv", x, net.weight(8, 3, 3, 3), strides=[2, 2]), 0.05, 0)
    a = net.qdq(net.node("MaxPool", a, kernel_shape=[2, 2], strides=[1, 1]), 0.05, 0)
    b = net.node("Conv", a, net.weight(8, 8, 3, 3), net.bias(8), pads=[1, 1, 1, 1])
    b = net.qdq(b, 0.2, 100)
    c = net.qdq(net.node("Relu", net.node("Add", a, b)), 0.15, 0)
    d = net.qdq(net.node("GlobalAveragePool", c), 0.08, 0)
    e = net.qdq(net.node("Flatten", d), 0.08, 0)
    f = net.node("Gemm", e, net.weight(5, 8), net.bias(5), transB=1)
    result = check(net, net.qdq(f, 0.1, 128), level=0.1, share=0.2)
    assert kinds(result) == ["conv2d", "conv2d", "add", "mean", "dense"]
    assert floats(result) == ["hone.dequantize"]
    assert len(result.conversions) == 2


@pytest.mark.parametrize(("dtype", "zero"), [("uint8", 128), ("int8", 0)])
@pytest.mark.parametrize("rank", [2, 3])
def test_matrix_product_is_integer_for_rows_of_any_rank(rank, dtype, zero):
    net = Net()
    shape = (2, 5, 12)[-rank:]
    x = net.qdq(net.input(*shape), 0.02, zero, dtype)
    y = net.node("Add", net.node("MatMul", x, net.weight(12, 7, axis=1)), net.bias(7))
    result = check(net, net.qdq(y, 0.05, zero, dtype), level=0.05)
    assert kinds(result) == ["dense"]
    assert floats(result) == ["hone.dequantize"]


def test_float_result_is_the_sum_up_to_half_a_step_of_the_bias_when_no_quantization_follows():
    net = Net()
    x = net.qdq(net.input(1, 3, 6, 6), 0.02, 128)
    y = net.node("Conv", x, net.weight(4, 3, 3, 3), net.bias(4))
    result = check(net, net.node("Sigmoid", y), level=3e-5, share=1)
    assert [layer.output for layer in result.quantized] == ["float32"]


@pytest.mark.parametrize("include", [0, 1])
def test_average_pooling_is_integer_when_windows_are_whole(include):
    net = Net()
    x = net.qdq(net.input(1, 3, 8, 8), 0.02, 100)
    pads = {"pads": [1, 1, 1, 1], "count_include_pad": 1} if include else {}
    y = net.node("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], **pads)
    assert kinds(check(net, net.qdq(y, 0.01, 120), level=0.01)) == ["avg_pool2d"]


def test_concatenation_rescales_its_parts_to_the_levels_of_the_result():
    net = Net()
    x = net.qdq(net.input(1, 3, 6, 6), 0.02, 128)
    parts = [
        net.qdq(net.node("Conv", x, net.weight(k, 3, 1, 1)), scale, 90)
        for k, scale in ((4, 0.02), (3, 0.031))
    ]
    y = net.qdq(net.node("Concat", *parts, axis=1), 0.031, 90)
    y = net.node("Conv", y, net.weight(5, 7, 1, 1))
    result = check(net, net.qdq(y, 0.1, 128), level=0.1, share=0.05)
    assert kinds(result) == ["conv2d"] * 3
    assert floats(result) == ["hone.dequantize"]


@pytest.mark.parametrize("op", ["Transpose", "Reshape", "Slice", "Relu", "MaxPool"])
def test_move_passes_levels_on_and_rescales_where_the_model_does(op):
    net = Net()
    x = net.qdq(net.input(1, 4, 6, 6), 0.02, 128)
    more = {
        "Transpose": ((), {"perm": [0, 2, 1, 3]}),
        "Reshape": ((net.const([2, 72], np.int64),), {}),
        "Slice": (tuple(net.const([v], np.int64) for v in (1, 5, 2)), {}),
        "Relu": ((), {}),
        "MaxPool": ((), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}),
    }
    inputs, attrs = more[op]
    y = net.node(op, x, *inputs, **attrs)
    outputs = net.qdq(y, 0.02, 128), net.qdq(y, 0.03, 100)
    assert set(floats(check(net, *outputs, level=0.03))) == {"hone.dequantize"}


def test_equal_quantizations_of_one_tensor_are_one():
    net = Net()
    x = net.qdq(net.input(1, 4, 6, 6), 0.02, 128)
    y = net.node("Conv", x, net.weight(4, 4, 3, 3))
    left, right = net.qdq(y, 0.05, 128), net.qdq(y, 0.05, 128)
    z = net.node("Add", left, net.qdq(net.node("MaxPool", right, kernel_shape=[1, 1]), 0.05, 128))
    result = check(net, net.qdq(z, 0.1, 128), level=0.1)
    assert kinds(result) == ["conv2d", "add"]
    assert floats(result) == ["hone.dequantize"]


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_integer_inputs_and_outputs_keep_their_type(dtype):
    net = Net()
    zero = 128 if dtype == "uint8" else 3
    x = net.dq(net.input(1, 4, 6, 6, dtype=dtype), 0.02, zero, dtype)
    levels = net.q(net.node("Conv", x, net.weight(5, 4, 3, 3)), 0.2, zero, dtype)
    result = check(net, levels, net.dq(levels, 0.2, zero, dtype))
    assert kinds(result) == ["conv2d"]


def test_levels_that_a_float_operator_reads_are_converted_for_it():
    net = Net()
    x = net.qdq(net.input(1, 4, 6, 6), 0.02, 128)
    y = net.qdq(net.node("Conv", x, net.weight(4, 4, 3, 3)), 0.05, 128)
    z = net.qdq(net.node("Sigmoid", y), 1 / 256, 0)
    w = net.node("Conv", net.node("Mul", y, z), net.weight(4, 4, 1, 1))
    result = check(net, net.qdq(w, 0.05, 128), level=0.05)
    assert kinds(result) == ["conv2d", "table"]
    assert [s.layer for s in result.skipped] == ["conv11"]
    assert "not quantized" in result.skipped[0].reason


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("conv1d", "no integer kernel for conv1d"),
        ("input channels", "one scale for each input channel"),
    ],
)
def test_layer_stays_float_with_a_reason_when_no_kernel_fits(case, reason):
    net = Net()
    rank = 3 if case == "conv1d" else 4
    x = net.qdq(net.input(*(1, 4, 7, 7)[:rank]), 0.02, 128)
    weight = (6, 4, 3, 3)[:rank]
    options: dict[str, Any] = {"axis": 1 if case == "input channels" else 0}
    y = net.node("Conv", x, net.weight(*weight, **options))
    result = check(net, net.qdq(y, 0.05, 128), level=0.05)
    assert result.quantized == ()
    (skipped,) = result.skipped
    assert reason in skipped.reason


@pytest.mark.parametrize(("groups", "channels", "filters"), [(2, 4, 6), (3, 48, 60), (8, 8, 24)])
@pytest.mark.parametrize("residual", [False, True])
def test_convolutions_of_groups_are_integer(groups, channels, filters, residual):
    net = Net()
    x = net.qdq(net.input(2, channels, 7, 6), 0.02, 121)
    w = net.weight(filters, channels // groups, 3, 3, dtype="uint8", zero=100)
    y = net.node("Conv", x, w, net.bias(filters), group=groups, pads=[1, 1, 1, 1])
    if residual:
        y = net.node("Add", y, net.qdq(net.input(2, filters, 7, 6), 0.03, 7))
    result = check(net, net.qdq(y, 0.1, 128), level=0.1, share=0.03 if residual else 0.01)
    assert (kinds(result), result.skipped) == (["conv2d"], ())
    assert floats(result) == ["hone.dequantize"]


@pytest.mark.parametrize(
    "attrs",
    [
        {"strides": [2, 2]},
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
        {"strides": [3, 2], "pads": [1, 0, 2, 1]},
        {"pads": [1, 1, 1, 1]},
    ],
    ids=["doubling", "output padding", "uneven", "stride one"],
)
@pytest.mark.parametrize("zero", [128, 30])
def test_transposed_convolutions_are_integer(attrs, zero):
    net = Net()
    x = net.qdq(net.input(2, 5, 4, 6), 0.02, 121)
    taps = (2, 2) if attrs == {"strides": [2, 2]} else (3, 3)
    w = net.weight(5, 7, *taps, axis=1, dtype="uint8", zero=zero)
    y = net.node("Relu", net.node("ConvTranspose", x, w, net.bias(7), **attrs))
    y = net.qdq(y, 0.05, 3)
    y = net.qdq(net.node("Conv", y, net.weight(4, 7, 1, 1)), 0.3, 128)
    result = check(net, y, level=0.3)
    assert (kinds(result), result.skipped) == (["conv2d_transpose", "conv2d"], ())
    assert result.quantized[0].layers == ("convtranspose3", "relu4")
    assert floats(result) == ["hone.dequantize"]


def test_transposed_convolution_at_the_end_has_a_float_result():
    net = Net()
    x = net.qdq(net.input(1, 5, 4, 6), 0.02, 121)
    y = net.node("ConvTranspose", x, net.weight(5, 3, 2, 2, axis=1), strides=[2, 2])
    result = check(net, y, level=0.01)
    assert (kinds(result), result.skipped) == (["conv2d_transpose"], ())


ACTIVATIONS = {
    "sigmoid": lambda net, x: net.node("Sigmoid", x),
    "tanh": lambda net, x: net.node("Tanh", x),
    "silu": lambda net, x: net.node("Mul", x, net.node("Sigmoid", x)),
    "hard swish": lambda net, x: net.node("HardSwish", x),
    "hard sigmoid": lambda net, x: net.node("HardSigmoid", x, alpha=0.2, beta=0.6),
    "leaky relu": lambda net, x: net.node("LeakyRelu", x, alpha=0.1),
    "elu": lambda net, x: net.node("Elu", x, alpha=0.7),
    "softplus": lambda net, x: net.node("Softplus", x),
    "gelu in pieces": lambda net, x: net.node(
        "Mul",
        net.node("Mul", x, net.const(0.5, np.float32)),
        net.node(
            "Add",
            net.node("Erf", net.node("Div", x, net.const(2**0.5, np.float32))),
            net.const(1.0, np.float32),
        ),
    ),
    "power": lambda net, x: net.node("Pow", x, net.const(2.0, np.float32)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_function_of_one_tensor_is_a_table(name):
    net = Net()
    x = net.qdq(net.input(1, 4, 6, 6), 0.05, 128)
    y = net.qdq(net.node("Conv", x, net.weight(4, 4, 3, 3)), 0.05, 128)
    y = net.qdq(ACTIVATIONS[name](net, y), 0.03, 40)
    y = net.qdq(net.node("Conv", y, net.weight(4, 4, 1, 1)), 0.1, 128)
    result = check(net, y, level=0.1, share=0.02)
    assert (kinds(result), result.skipped) == (["conv2d", "table", "conv2d"], ())
    assert floats(result) == ["hone.dequantize"]


def test_gate_of_channels_is_integer():
    """Squeeze and excitation, as a quantizer writes it: every result quantized."""
    net = Net()
    x = net.qdq(net.input(2, 8, 6, 6), 0.05, 100)
    g = net.qdq(net.node("GlobalAveragePool", x), 0.02, 128)
    g = net.qdq(net.node("Conv", g, net.weight(4, 8, 1, 1), net.bias(4)), 0.05, 128)
    s = net.qdq(net.node("Sigmoid", g), 1 / 256, 0)
    g = net.qdq(net.node("Mul", g, s), 0.03, 10)
    g = net.qdq(net.node("Conv", g, net.weight(8, 4, 1, 1), net.bias(8)), 0.05, 128)
    g = net.qdq(net.node("Sigmoid", g), 1 / 256, 0)
    y = net.qdq(net.node("Mul", x, g), 0.04, 100)
    y = net.qdq(net.node("Conv", y, net.weight(4, 8, 1, 1)), 0.1, 128)
    result = check(net, y, level=0.1, share=0.03)
    assert result.skipped == ()
    assert kinds(result) == [
        *("mean", "conv2d", "table", "multiply", "conv2d", "table", "multiply", "conv2d"),
    ]
    assert floats(result) == ["hone.dequantize"]


def test_residual_of_shuffled_channels_is_added_as_it_lies():
    net = Net()
    x = net.qdq(net.input(1, 8, 6, 5), 0.02, 128)
    x = net.qdq(net.node("Conv", x, net.weight(8, 8, 1, 1)), 0.05, 128)
    y = net.node("Reshape", x, net.const([1, 2, 4, 6, 5], np.int64))
    y = net.node("Transpose", y, perm=[0, 2, 1, 3, 4])
    y = net.qdq(net.node("Reshape", y, net.const([1, 8, 6, 5], np.int64)), 0.05, 128)
    y = net.node("MaxPool", y, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    y = net.qdq(y, 0.05, 128)
    z = net.qdq(net.node("Conv", y, net.weight(8, 8, 1, 1), net.bias(8)), 0.2, 100)
    z = net.node("Conv", z, net.weight(8, 8, 1, 1), net.bias(8))
    check(net, net.qdq(net.node("Add", z, y), 0.4, 120), level=0.4, share=0.03)


def test_shuffle_of_channels_and_resizing_are_integer():
    net = Net()
    x = net.qdq(net.input(1, 8, 5, 4), 0.05, 100)
    name = f"split{len(net.nodes)}"
    net.nodes.append(helper.make_node("Split", [x], [f"{name}_0", f"{name}_1"], axis=1, name=name))
    left = net.qdq(f"{name}_0", 0.05, 100)
    right = net.qdq(f"{name}_1", 0.05, 100)
    right = net.qdq(net.node("Conv", right, net.weight(4, 4, 1, 1)), 0.04, 90)
    y = net.qdq(net.node("Concat", left, right, axis=1), 0.05, 100)
    y = net.node("Reshape", y, net.const([1, 2, 4, 5, 4], np.int64))
    y = net.node("Transpose", y, perm=[0, 2, 1, 3, 4])
    y = net.node("Reshape", y, net.const([1, 8, 5, 4], np.int64))
    y = net.qdq(y, 0.05, 100)
    y = net.node(
        "Resize", y, "", net.const([1, 1, 2, 2], np.float32),
        mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric",
    )  # fmt: skip
    y = net.qdq(y, 0.05, 100)
    y = net.qdq(net.node("Conv", y, net.weight(4, 8, 3, 3)), 0.1, 128)
    result = check(net, y, level=0.1)
    assert result.skipped == ()
    assert floats(result) == ["hone.dequantize"]
    calls = [b.value for b in Dataflow(result.module["main"]).bindings]
    (resizing,) = [c for c in calls if getattr(c, "op", None) == RESIZE]
    assert resizing.attrs.layout == "NHWC"


def test_a_crop_that_fills_in_a_value_stays_float():
    net = Net()
    x = net.qdq(net.input(1, 4, 5, 6), 0.05, 100)
    x = net.qdq(net.node("Conv", x, net.weight(4, 4, 1, 1)), 0.05, 100)
    region = net.const([0, 0, -0.5, 0.2, 1, 1, 1.3, 0.8], np.float32)
    x = net.node(
        "Resize", x, region, "", net.const([1, 4, 7, 5], np.int64), mode="nearest",
        coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=1.5,
    )  # fmt: skip
    y = net.node("Conv", net.qdq(x, 0.05, 100), net.weight(4, 4, 1, 1))
    result = check(net, net.qdq(y, 0.1, 128), level=0.1)
    assert "relax.image.resize2d" in floats(result)


def test_two_activations_are_multiplied_in_float():
    net = Net()
    x, y = (net.qdq(net.input(1, 4, 4), 0.02, 128) for _ in range(2))
    result = check(net, net.qdq(net.node("MatMul", x, y), 0.05, 128), level=0.05)
    assert (kinds(result), result.skipped) == ([], ())


def test_sums_that_int32_cannot_hold_stay_float():
    net = Net()
    x = net.qdq(net.input(1, 4, 4, 4), 1e-6, 128)
    w = net.dq(net.const(np.full((2, 4, 1, 1), 100), "int8"), 1e-4, 0, "int8")
    y = net.node("Conv", x, w, net.const([5.0, -4.0], np.float32))
    result = match_qdq(importer.load(net.model(net.q(y, 0.1, 100))).module)
    assert "int32 cannot hold" in result.skipped[0].reason


def test_extreme_weights_and_levels_are_exact():
    """-128 × 255 in every product: no kernel may saturate in between."""
    net = Net()
    x = net.dq(net.input(1, 64, 4, 4, dtype="uint8"), 1.0, 0)
    w = net.dq(net.const(np.full((8, 64, 3, 3), -128), "int8"), 1.0, 0, "int8")
    y = net.node("Conv", x, w)
    model = net.model(net.q(y, 100000.0, 255))
    for feed in (np.full((1, 64, 4, 4), 255, np.uint8), net.feeds()["x0"]):
        (given,) = run(model, {"x0": feed})
        sums = -128 * np.lib.stride_tricks.sliding_window_view(
            feed.astype(np.int64), (3, 3), axis=(2, 3)
        ).sum((1, 4, 5))
        expected = np.clip(np.rint(sums * np.float32(1e-5)) + 255, 0, 255)
        assert np.array_equal(given, np.broadcast_to(expected[:, None], given.shape))


def test_module_without_quantization_is_left_as_it_is():
    net = Net()
    model = net.model(net.node("Relu", net.input(1, 4)))
    module = importer.load(model).module
    assert not is_qdq(module)
    assert match_qdq(module).module.same_as(module)


def test_matched_module_is_not_matched_again():
    net = Net()
    x = net.qdq(net.input(1, 4, 6, 6), 0.02, 128)
    y = net.qdq(net.node("Conv", x, net.weight(4, 4, 3, 3)), 0.05, 128)
    module = importer.load(net.model(y)).module
    assert is_qdq(module)
    matched = match_qdq(module).module
    assert not is_qdq(matched)
    assert match_qdq(matched).quantized == ()


def test_weights_that_the_model_quantizes_itself_are_integers():
    """NNCF and PyTorch keep float weights before their quantization, some transposed after it."""
    net = Net()
    x = net.qdq(net.input(1, 4, 6, 6), 0.02, 128)
    floats_ = net.const(net.rng.standard_normal((5, 4, 3, 3)), np.float32)
    y = net.node("Conv", x, net.qdq(floats_, 0.03, 0, "int8"), net.bias(5))
    y = net.node("Reshape", net.qdq(y, 0.1, 128), net.const([4, 20], np.int64))
    w = net.node("Transpose", net.weight(7, 20), perm=[1, 0])
    result = check(net, net.qdq(net.node("MatMul", y, w), 0.2, 128), level=0.2)
    assert kinds(result) == ["conv2d", "dense"]
    assert floats(result) == ["hone.dequantize"]


def test_scale_known_at_run_time_and_scales_along_an_axis_stay_float():
    net = Net()
    x = net.input(1, 4, 6, 6)
    axis = {"axis": 1}
    scales, zeros = net.const([0.01, 0.02, 0.03, 0.04], np.float32), net.const([9] * 4, np.uint8)
    each = net.node("QuantizeLinear", x, scales, zeros, **axis)
    each = net.node("DequantizeLinear", each, scales, zeros, **axis)
    y = net.node("Conv", each, net.weight(5, 4, 3, 3))
    result = check(net, net.qdq(y, 0.1, 128), level=0.1)
    assert kinds(result) == []
    assert "one constant scale" in result.skipped[0].reason


@pytest.mark.parametrize("zero", [0, 77, 200])
@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_dynamically_quantized_layer_is_integer(op, zero):
    net = Net()
    x = net.input(*((1, 4, 6, 6) if op == "Conv" else (2, 6, 40)))
    name = f"dynamic{len(net.nodes)}"
    outputs = [f"{name}_{part}" for part in ("levels", "scale", "zero")]
    net.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], outputs, name=name))
    shape = (5, 4, 3, 3) if op == "Conv" else (40, 7)
    w = net.const(net.rng.integers(0, 256, shape), np.uint8)
    attrs = {"pads": [1, 0, 1, 2]} if op == "Conv" else {}
    points = [outputs[2], net.const(zero, np.uint8)]
    y = net.node(f"{op}Integer", outputs[0], w, *points, **attrs)
    y = net.node("Mul", net.node("Cast", y, to=1), outputs[1])
    result = check(net, y, level=1.0, share=0.02)
    assert kinds(result) == ["conv2d" if op == "Conv" else "dense"]
    assert result.skipped == ()


def test_padding_with_zeros_is_padding_with_zero_points():
    net = Net()
    x = net.qdq(net.input(1, 4, 6, 6), 0.02, 77)
    y = net.node("Pad", x, net.const([0, 0, 1, 0, 0, 0, 2, 1], np.int64))
    y = net.qdq(net.node("Conv", net.qdq(y, 0.02, 77), net.weight(5, 4, 3, 3)), 0.05, 128)
    result = check(net, y, level=0.05)
    assert floats(result) == ["hone.dequantize"]


def test_levels_of_int8_with_a_zero_point_of_the_run_are_integer():
    net = Net()
    levels, point = net.input(1, 4, 6, 6, dtype="int8"), net.input(1, dtype="int8")
    x = net.node("DequantizeLinear", levels, net.const([0.02], np.float32), point)
    y = net.node("Conv", x, net.weight(5, 4, 3, 3), pads=[1, 1, 1, 1])
    result = check(net, y, level=0.1)
    assert kinds(result) == ["conv2d"]
