"""Quantized operators of ONNX and of onnxruntime become QDQ, with the layers' ids and values."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hone import importer, shadow
from hone.errors import ModelError
from hone.importing.layer_names import layer_binding
from hone.importing.qdq import rewrite
from hone.passes.quantize.match_qdq import match_qdq

MICROSOFT = "com.microsoft"


def levels(dtype: str, *shape: int, seed: int = 3) -> np.ndarray:
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max + 1, shape, dtype)


def biases(channels: int) -> np.ndarray:
    return np.random.default_rng(4).integers(-3000, 3000, channels, np.int32)


def scale(value: Any) -> np.ndarray:
    return np.array(value, np.float32)


def single(
    op: str, inputs: list[Any], *, domain: str = "", opset: int = 17, **attrs: Any
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Return a model of one node named ``layer``; arrays in a tuple are inputs, others weights."""
    names, values, constants, feeds = [], [], [], {}
    for index, given in enumerate(inputs):
        names.append("" if given is None else f"i{index}")
        if isinstance(given, tuple):
            feeds[f"i{index}"] = given[0]
            kind = helper.np_dtype_to_tensor_dtype(given[0].dtype)
            values.append(helper.make_tensor_value_info(f"i{index}", kind, given[0].shape))
        elif given is not None:
            constants.append(numpy_helper.from_array(np.asarray(given), f"i{index}"))
    node = helper.make_node(op, names, ["result"], name="layer", domain=domain, **attrs)
    graph = helper.make_graph([node], "g", values, [onnx.ValueInfoProto(name="result")], constants)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=7), feeds


def compare(
    op: str, inputs: list[Any], *, integer: str = "", off: float = 1, **options: Any
) -> importer.CheckReport:
    """Compare with onnxruntime's own kernel, and look for the integer operator ``integer``."""
    model, feeds = single(op, inputs, **options)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (expected,) = session.run(None, feeds)
    imported = importer.load(model)
    (given,), _ = shadow.evaluate(imported.module, feeds)
    assert (given.dtype, given.shape) == (expected.dtype, expected.shape)
    assert len(np.unique(expected)) > 2
    distance = np.abs(given.astype(np.float64) - expected.astype(np.float64))
    assert distance.max() <= off
    assert np.mean(distance > off / 2) <= 0.05
    if integer:
        assert [str(q.kind) for q in match_qdq(imported.module).quantized] == [integer]
    assert "layer" in {layer.id for layer in imported.layers}
    return importer.check(model)


WEIGHT_SCALES = [0.01, [0.01, 0.02, 0.005, 0.013, 0.008, 0.03]]


@pytest.mark.parametrize("weight_scale", WEIGHT_SCALES, ids=["tensor", "channel"])
@pytest.mark.parametrize(("dtype", "zero"), [("uint8", 120), ("int8", -3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("opset", [10, 17])
def test_qlinear_conv_equals_onnxruntime(dtype, zero, weight_scale, bias, opset):
    zero_point = np.array(zero, dtype)
    weight_zero = np.zeros(np.shape(weight_scale), np.int8)
    inputs = [
        *((levels(dtype, 1, 4, 7, 7),), scale(0.02), zero_point),
        *(levels("int8", 6, 4, 3, 3), scale(weight_scale), weight_zero, scale(0.4), zero_point),
    ]
    if bias:
        inputs.append(biases(6))
    report = compare(
        "QLinearConv", inputs, integer="conv2d", pads=[1, 1, 1, 1], strides=[2, 1], opset=opset
    )
    assert report.macs == 6 * 4 * 7 * 4 * 9


def test_qlinear_conv_of_groups_and_zero_points_equals_onnxruntime():
    compare(
        "QLinearConv",
        [
            *((levels("uint8", 1, 4, 7, 7),), scale(0.02), np.uint8(120)),
            *(levels("uint8", 6, 2, 3, 3), scale(0.01), np.uint8(77), scale(0.3), np.uint8(9)),
        ],
        group=2,
        dilations=[2, 1],
    )


@pytest.mark.parametrize("weight_scale", [0.01, [0.01, 0.02, 0.015]], ids=["tensor", "column"])
@pytest.mark.parametrize(("dtype", "zero"), [("uint8", 120), ("int8", -3)])
def test_qlinear_matmul_equals_onnxruntime(dtype, zero, weight_scale):
    zero_point = np.array(zero, dtype)
    weight_zero = np.zeros(np.shape(weight_scale), np.int8)
    compare(
        "QLinearMatMul",
        [
            *((levels(dtype, 5, 9),), scale(0.02), zero_point),
            *(levels("int8", 9, 3), scale(weight_scale), weight_zero, scale(0.3), zero_point),
        ],
        integer="dense",
    )


@pytest.mark.parametrize("size", [3, 40], ids=["float sums", "int32 sums"])
@pytest.mark.parametrize("zero_points", [True, False])
def test_conv_integer_is_exact(size, zero_points):
    inputs = [(levels("uint8", 1, 20, size + 2, size + 2),), levels("uint8", 4, 20, size, size)]
    if zero_points:
        inputs += [np.uint8(7), np.uint8(120)]
    compare("ConvInteger", inputs, off=0, integer="conv2d" if size == 3 else "")


@pytest.mark.parametrize("depth", [9, 3000], ids=["float sums", "int32 sums"])
@pytest.mark.parametrize("zero", [np.int8(5), np.array([5, -3, 0], np.int8)], ids=["one", "each"])
def test_matmul_integer_is_exact(depth, zero):
    weight = levels("int8", depth, 3)
    inputs = [(levels("uint8", 5, depth),), weight, np.uint8(3), zero]
    compare("MatMulInteger", inputs, off=0, integer="dense" if depth == 9 else "")


def test_matmul_integer_computes_in_integers_when_float_holds_its_sums():
    inputs = [(levels("uint8", 5, 9),), levels("int8", 9, 3), np.uint8(3)]
    compare("MatMulInteger", inputs, off=0, integer="dense")


@pytest.mark.parametrize("with_output", [True, False])
@pytest.mark.parametrize("transposed", [0, 1])
def test_q_gemm_equals_onnxruntime(transposed, with_output):
    shape = (4, 9) if transposed else (9, 4)
    inputs = [
        *((levels("uint8", 3, 9),), scale(0.02), np.uint8(100)),
        *(levels("int8", *shape), scale([0.01, 0.02, 0.03, 0.01]), np.zeros(4, np.int8)),
        biases(4),
    ]
    if with_output:
        inputs += [scale(0.2), np.uint8(90)]
    compare(
        "QGemm", inputs, domain=MICROSOFT, transB=transposed, integer="dense",
        off=1 if with_output else 1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_qlinear_add_equals_onnxruntime(dtype):
    left, right = ((levels(dtype, 2, 60, seed=seed),) for seed in range(2))
    zeros = [np.array(z, dtype) for z in (3, 100, 50)]
    compare(
        "QLinearAdd",
        [left, scale(0.02), zeros[0], right, scale(0.05), zeros[1], scale(0.07), zeros[2]],
        domain=MICROSOFT,
        integer="add",
    )


def test_qlinear_mul_equals_onnxruntime():
    left, right = ((levels("uint8", 2, 60, seed=seed),) for seed in range(2))
    zero = np.uint8(128)
    compare(
        "QLinearMul",
        [left, scale(0.02), zero, right, scale(0.05), zero, scale(0.07), zero],
        domain=MICROSOFT,
    )


@pytest.mark.parametrize("include", [0, 1])
def test_qlinear_average_pool_equals_onnxruntime(include):
    compare(
        "QLinearAveragePool",
        [(levels("uint8", 1, 3, 8, 8),), scale(0.02), np.uint8(9), scale(0.01), np.uint8(3)],
        domain=MICROSOFT,
        kernel_shape=[3, 3],
        pads=[1, 1, 1, 1],
        count_include_pad=include,
        integer="avg_pool2d" if include else "",
    )


def test_qlinear_global_average_pool_equals_onnxruntime():
    compare(
        "QLinearGlobalAveragePool",
        [(levels("uint8", 1, 90, 8, 8),), scale(0.02), np.uint8(9), scale(0.01), np.uint8(3)],
        domain=MICROSOFT,
        integer="mean",
    )


def test_qlinear_concat_equals_onnxruntime():
    parts = [
        *((levels("uint8", 1, 3, 5, 5),), scale(0.02), np.uint8(9)),
        *((levels("uint8", 1, 2, 5, 5),), scale(0.03), np.uint8(99)),
    ]
    compare("QLinearConcat", [scale(0.03), np.uint8(50), *parts], domain=MICROSOFT, axis=1)


@pytest.mark.parametrize("op", ["QLinearSigmoid", "QLinearLeakyRelu"])
def test_qlinear_activation_equals_onnxruntime(op):
    output = scale(1 / 256 if op == "QLinearSigmoid" else 0.03)
    inputs = [(levels("uint8", 2, 60),), scale(0.02), np.uint8(128), output, np.uint8(0)]
    compare(op, inputs, domain=MICROSOFT)


@pytest.mark.parametrize("channels_last", [0, 1])
def test_node_of_another_form_is_refused_by_name(channels_last):
    inputs = [(levels("uint8", 1, 8, 8, 3),), scale(0.02), np.uint8(9), scale(0.01)]
    model, _ = single(
        "QLinearGlobalAveragePool", inputs, domain=MICROSOFT, channels_last=channels_last
    )
    with pytest.raises(ModelError, match="QLinearGlobalAveragePool is unsupported"):
        importer.load(model)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_scale_that_no_level_has_is_refused(value):
    x = np.ones((2, 3), np.float32)
    model, _ = single("QuantizeLinear", [(x,), scale(value), np.uint8(3)])
    with pytest.raises(ModelError, match=r"its scale is (0|nan|inf), but must be finite and not 0"):
        importer.load(model)


def test_layers_keep_their_ids_and_tensors_their_names_when_rewritten():
    zero = np.uint8(3)
    inputs = [
        *((levels("uint8", 5, 9),), scale(0.02), zero),
        *(levels("int8", 9, 3), scale(0.1), np.int8(0), scale(0.3), zero),
    ]
    model, _ = single("QLinearMatMul", inputs)
    rewritten = rewrite(model)
    assert [n.op_type for n in rewritten.graph.node] == [
        *("DequantizeLinear", "DequantizeLinear", "MatMul", "QuantizeLinear")
    ]
    assert rewritten.graph.node[2].name == "layer"
    assert rewritten.graph.node[3].output == ["result"]
    assert model.graph.node[0].op_type == "QLinearMatMul"
    imported = importer.load(model)
    (matched,) = match_qdq(imported.module).quantized
    assert {layer.id: layer.binding for layer in imported.layers}["layer"] == matched.layer
    assert layer_binding(matched.layer) == "layer"


def test_model_without_quantized_operators_is_returned_as_it_is():
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    model = helper.make_model(graph)
    assert rewrite(model) is model
