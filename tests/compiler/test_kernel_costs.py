"""Operations and bytes of kernels against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from hone import pipeline
from hone.importer import load
from hone.profiling.kernel_costs import kernel_costs
from hone.steps import half
from hone.steps.candidate import Context
from hone.steps.options.half import Bf16Step
from hone.targets.target import resolve


def model_of(node, inputs, outputs, weights):
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def costs_of(node, inputs, outputs, weights, *, target="x86-64-v3"):
    model = load(model_of(node, inputs, outputs, weights))
    lowered = pipeline.lower(model.module, resolve(target), threads=2)
    return kernel_costs(lowered, model)


@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4", "rpi4"])
def test_rounded_tiles_do_not_count(target):
    # 5 rows and 7 columns fill no tile on any target: 2 x 5 x 3 x 7 multiply-adds and 5 x 7 sums
    # of the bias are what the layer needs.
    weights = {"w": np.ones((3, 7), np.float32), "b": np.ones(7, np.float32)}
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"])
    x, y = ("x", TensorProto.FLOAT, [5, 3]), ("y", TensorProto.FLOAT, [5, 7])
    (cost,) = costs_of(node, [x], [y], weights, target=target).values()
    assert cost.operations == 2 * 5 * 3 * 7 + 5 * 7


def test_convolution_counts_its_multiply_adds_when_channels_are_rounded():
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    x, y = ("x", TensorProto.FLOAT, [1, 3, 9, 9]), ("y", TensorProto.FLOAT, [1, 11, 8, 8])
    costs = costs_of(node, [x], [y], {"w": np.ones((11, 3, 2, 2), np.float32)})
    convolution = max(costs.values(), key=lambda cost: cost.operations)
    assert convolution.operations == 2 * 11 * 8 * 8 * 3 * 2 * 2


def test_products_of_tiles_are_the_layers_own_when_widening_and_rounding_are_written_out():
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1, 1, 1, 1])
    x, y = ("x", TensorProto.FLOAT, [1, 30, 13, 11]), ("y", TensorProto.FLOAT, [1, 70, 13, 11])
    weights = {"w": np.ones((70, 30, 3, 3), np.float32)}
    target = resolve("sapphirerapids")
    model = load(model_of(node, [x], [y], weights))
    context = Context(target=target, threads=2, calibration=None)
    model = half.propose(model, Bf16Step(kind="bf16"), context).model
    costs = kernel_costs(pipeline.lower(model.module, target, threads=2), model)
    convolution = max(costs.values(), key=lambda cost: cost.operations)
    assert convolution.dtype == "bfloat16"
    assert convolution.operations == 2 * 70 * 13 * 11 * 30 * 3 * 3


def test_gather_touches_the_rows_that_it_reads():
    node = helper.make_node("Gather", ["table", "i"], ["y"])
    i, y = ("i", TensorProto.INT64, [2]), ("y", TensorProto.FLOAT, [2, 16])
    (cost,) = costs_of(node, [i], [y], {"table": np.ones((1000, 16), np.float32)}).values()
    assert cost.touched_bytes == (2 * 16 * 4, 2 * 8, 2 * 16 * 4)
    assert cost.operations == 0


def test_calls_of_a_shared_kernel_count_one_by_one(dense):
    model, assembled = dense
    (cost,) = kernel_costs(assembled.lowered, model).values()
    # 3 x 5 outputs: 5 multiply-adds, bias and maximum each
    assert cost.operations == 15 * (2 * 5 + 2)
