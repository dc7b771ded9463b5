"""Multiply-adds and parameters against counts by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from hone.importer import load
from hone.profiling.layer_costs import LayerCost, layer_costs


@dataclass(frozen=True)
class Case:
    op: str
    given: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...]
    attributes: dict[str, object]
    macs: int
    shape: tuple[int, ...]


CASES = {
    # 2 x 5 x 3 x 4 outputs, each from 3 channels of 3 x 2 taps
    "convolution": Case("Conv", (2, 3, 5, 5), ((5, 3, 3, 2), (5,)), {}, 120 * 18, (2, 5, 3, 4)),
    "grouped": Case("Conv", (1, 4, 5, 5), ((6, 2, 3, 3),), {"group": 2}, 54 * 18, (1, 6, 3, 3)),
    "depthwise": Case("Conv", (1, 4, 5, 5), ((4, 1, 3, 3),), {"group": 4}, 36 * 9, (1, 4, 3, 3)),
    # each of 2 x 3 x 3 inputs goes to 5 channels of 2 x 2 taps
    "transposed": Case("ConvTranspose", (1, 2, 3, 3), ((2, 5, 2, 2),), {}, 18 * 20, (1, 5, 4, 4)),
    "matmul": Case("MatMul", (2, 3, 5), ((5, 7),), {}, 42 * 5, (2, 3, 7)),
    "gemm": Case("Gemm", (3, 5), ((5, 7), (7,)), {}, 21 * 5, (3, 7)),
}


def cost_of(case: Case) -> LayerCost:
    names = [f"w{index}" for index in range(len(case.weights))]
    node = helper.make_node(case.op, ["x", *names], ["y"], name="layer", **case.attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, case.given)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, case.shape)],
        [
            numpy_helper.from_array(np.ones(shape, np.float32), name)
            for name, shape in zip(names, case.weights, strict=True)
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    (cost,) = layer_costs(load(model))
    return cost


@pytest.mark.parametrize("name", CASES)
def test_counts_as_by_hand(name):
    case = CASES[name]
    assert cost_of(case) == LayerCost(
        id="layer",
        op_type=case.op,
        dtype="float32",
        shape=case.shape,
        macs=case.macs,
        parameters=sum(int(np.prod(shape)) for shape in case.weights),
    )


def test_other_operators_count_as_nothing():
    case = Case("Relu", (2, 3), (), {}, 0, (2, 3))
    assert (cost_of(case).macs, cost_of(case).parameters) == (0, 0)


def test_layers_that_were_removed_cost_nothing():
    import tvm
    from tvm import relax

    from hone import models

    model = load(models.build("mlp"))
    x = relax.Var("x", relax.TensorType((1, 2), "float32"))
    block = relax.BlockBuilder()
    with block.function("main", [x]):
        with block.dataflow():
            result = block.emit_output(relax.op.nn.relu(x))
        block.emit_func_output(result)
    module: tvm.IRModule = block.get()
    assert {(c.macs, c.shape) for c in layer_costs(model.with_module(module))} == {(0, None)}
