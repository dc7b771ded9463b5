"""Divisions of floats by a constant 0, as numpy does them."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

import hone
from hone import pipeline
from hone.targets.target import resolve


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("zero", [0.0, -0.0], ids=["+0", "-0"])
def test_floats_divided_by_a_constant_0(zero: float, shape: tuple[int, ...]) -> None:
    divisor = np.full(shape, zero, np.float32)
    graph = helper.make_graph(
        [helper.make_node("Div", ["x", "d"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 6))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 6))],
        [numpy_helper.from_array(divisor, "d")],
    )
    imported = hone.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    target = resolve("host")
    scheduled = pipeline.schedule(
        pipeline.lower(imported.module, target, threads=1), target, threads=1
    )
    executable = pipeline.build_executable(scheduled.module, target, threads=1)
    virtual = relax.VirtualMachine(executable, tvm.cpu())
    x = np.array([[2, -3, 0, np.inf, -np.inf, np.nan]], np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = x / divisor
    np.testing.assert_array_equal(virtual["main"](tvm.runtime.tensor(x)).numpy(), exact)
