"""Functions whose loops TVM wrote out, such as scans and sorts, compile as they are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import hone
from hone import runtime


def model(
    node: onnx.NodeProto,
    constant: onnx.TensorProto,
    *outputs: onnx.ValueInfoProto,
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", dtype, [4, 3])
    graph = helper.make_graph([node], "g", [x], list(outputs), [constant])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_cumulative_sum_compiles_as_it_is(rng: np.random.Generator) -> None:
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 3])
    axis = numpy_helper.from_array(np.int64(1), "axis")
    package = hone.compile(
        hone.load(model(helper.make_node("CumSum", ["x", "axis"], ["y"]), axis, y))
    )
    x = rng.standard_normal((4, 3)).astype("float32")
    np.testing.assert_allclose(runtime.load(package).run({"x": x})["y"], x.cumsum(1), rtol=1e-6)


@pytest.mark.parametrize("extra", [False, True], ids=["float32", "int32"])
def test_top_k_of_integers_says_that_it_needs_the_second_runtime_library(
    extra: bool, rng: np.random.Generator
) -> None:
    dtype = TensorProto.INT32 if extra else TensorProto.FLOAT
    values = helper.make_tensor_value_info("v", dtype, [4, 2])
    indices = helper.make_tensor_value_info("i", TensorProto.INT64, [4, 2])
    k = numpy_helper.from_array(np.array([2], np.int64), "k")
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"])
    package = hone.compile(hone.load(model(node, k, values, indices, dtype=dtype)))
    assert package.manifest.needs_runtime_extra == extra
    x = rng.permutation(12).reshape(4, 3).astype("int32" if extra else "float32")
    result = runtime.load(package).run({"x": x})
    order = np.argsort(-x, axis=1)[:, :2]
    np.testing.assert_array_equal(result["i"], order)
    np.testing.assert_array_equal(result["v"], np.take_along_axis(x, order, 1))
