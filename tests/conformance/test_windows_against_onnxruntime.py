"""Convolutions, pooling and Gemm with drawn attributes, against onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from hone import importer, parity, shadow
from hone.errors import ModelError

AUTO_PADS = ("NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")


def window(rng, rank, *, dilate=True):
    """Draw kernel, strides, dilations and a padding that is smaller than the kernel."""
    kernel = [int(k) for k in rng.integers(1, 4, rank)]
    attributes = {
        "kernel_shape": kernel,
        "strides": [int(s) for s in rng.integers(1, 4, rank)],
        "auto_pad": AUTO_PADS[rng.integers(len(AUTO_PADS))],
    }
    if dilate:
        attributes["dilations"] = [int(d) for d in rng.integers(1, 3, rank)]
    if attributes["auto_pad"] == "NOTSET":
        attributes["pads"] = [int(rng.integers(0, k)) for k in kernel * 2]
    elif dilate:
        attributes["dilations"] = [1] * rank  # onnxruntime refuses both together
    return attributes


def weight(rng, name, *shape):
    return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)


def conv(rng):
    rank = int(rng.integers(1, 4))
    group, depth, width = (int(n) for n in rng.integers(1, 4, 3))
    attributes = window(rng, rank)
    kernel = attributes["kernel_shape"]
    weights = [weight(rng, "w", group * width, depth, *kernel), weight(rng, "b", group * width)]
    names = ["x", "w", "b"][: int(rng.integers(2, 4))]
    node = helper.make_node("Conv", names, ["y"], group=group, **attributes)
    return node, [2, group * depth, *rng.integers(6, 10, rank)], weights


def conv_transpose(rng):
    rank = int(rng.integers(1, 3))
    group, depth, width = (int(n) for n in rng.integers(1, 4, 3))
    attributes = window(rng, rank)
    if attributes["auto_pad"] == "NOTSET":
        attributes["output_padding"] = [int(rng.integers(0, s)) for s in attributes["strides"]]
    kernel = attributes["kernel_shape"]
    weights = [weight(rng, "w", group * depth, width, *kernel), weight(rng, "b", group * width)]
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], group=group, **attributes)
    return node, [1, group * depth, *rng.integers(4, 7, rank)], weights


def max_pool(rng):
    rank = int(rng.integers(1, 4))
    attributes = window(rng, rank) | {"ceil_mode": int(rng.integers(2))}
    return (
        helper.make_node("MaxPool", ["x"], ["y"], **attributes),
        [1, 3, *rng.integers(6, 10, rank)],
        [],
    )


def average_pool(rng):
    rank = int(rng.integers(1, 4))
    attributes = window(rng, rank, dilate=False) | {
        "ceil_mode": int(rng.integers(2)),
        "count_include_pad": int(rng.integers(2)),
    }
    node = helper.make_node("AveragePool", ["x"], ["y"], **attributes)
    return node, [1, 3, *rng.integers(6, 10, rank)], []


def gemm(rng):
    m, k, n = (int(s) for s in rng.integers(1, 6, 3))
    a, b, beta = (float(v) for v in rng.choice([0.0, 1.0, 0.5], 3))
    trans_a, trans_b = (int(t) for t in rng.integers(0, 2, 2))
    bias = [(n,), (m, n), (m, 1), (1,), ()][rng.integers(5)]
    weights = [weight(rng, "w", *((n, k) if trans_b else (k, n))), weight(rng, "c", *bias)]
    node = helper.make_node(
        "Gemm", ["x", "w", "c"], ["y"], alpha=a + b, beta=beta, transA=trans_a, transB=trans_b
    )
    return node, [k, m] if trans_a else [m, k], weights


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("draw", [conv, conv_transpose, max_pool, average_pool, gemm])
def test_drawn_attributes_agree_with_onnxruntime(draw, seed):
    node, shape, weights = draw(np.random.default_rng(seed))
    shape = [int(s) for s in shape]
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        weights,
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    try:
        model = importer.load(proto)
    except ModelError as error:
        pytest.skip(f"refused: {error.problems}")

    def run(inputs):
        return {"y": shadow.evaluate(model.module, inputs)[0][0]}

    report = parity.check(model, run, samples=1, rtol=1e-5)
    if report.status == parity.Status.NOT_CHECKED:
        pytest.skip(report.reason)
