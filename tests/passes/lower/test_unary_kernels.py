"""Every function of one value at NaN, infinities, zeros of both signs and the ends of float32.

One network has an output for each function; onnxruntime is the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

import hone
from hone import pipeline
from hone.targets.target import Target

LEAST = float(np.finfo(np.float32).tiny)
MOST = float(np.finfo(np.float32).max)
# Of both signs: where exp leaves float32, where rounding is a tie, where erf and tanh are 1.
POSITIVE = (
    *(0.0, LEAST, 1e-30, 1e-8, 0.25, 0.5, 1.0, 1.5, 2.5, 3.0, 3.99, 4.0, 4.01, 5.7, 8.99, 9.0),
    *(9.01, 20.0, 87.3, 88.0, 88.8, 104.5, 1e4, 8388609.0, 1e10, 1e30, MOST, np.inf),
)
VALUES = np.array([np.nan, *POSITIVE, *(-value for value in POSITIVE)], np.float32)
# Rows of 37: two vectors of 16 lanes, or four of 8, and what is left over; each value in each lane.
SHAPE = (len(VALUES), 37)
DATA = np.resize(VALUES, SHAPE)


@dataclass(frozen=True, kw_only=True)
class Function:
    """One node of one input.

    Parameters
    ----------
    constants : tuple of float
        Further inputs.
    least : float
        Below this nothing is asked.
    """

    op: str
    id: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    constants: tuple[float, ...] = ()
    least: float = -np.inf

    @property
    def name(self) -> str:
        return self.id or self.op.lower()


FUNCTIONS = [
    *(Function(op=op) for op in ("Abs", "Neg", "Floor", "Ceil", "Round", "Sign", "Reciprocal")),
    *(Function(op=op) for op in ("Relu", "Sqrt", "Exp", "Log", "Sigmoid", "Tanh", "Erf")),
    *(Function(op=op) for op in ("HardSigmoid", "HardSwish", "Softplus", "Softsign", "Elu")),
    *(Function(op=op) for op in ("Selu", "Celu", "LeakyRelu", "ThresholdedRelu", "Mish")),
    *(Function(op=op) for op in ("Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh")),
    *(Function(op=op) for op in ("Asinh", "Acosh", "Atanh", "Shrink", "Gelu")),
    Function(op="Gelu", id="gelu_tanh", attributes={"approximate": "tanh"}),
    Function(op="LeakyRelu", id="leaky_relu_steep", attributes={"alpha": 1.5}),
    Function(op="Clip", constants=(-1.0, 6.0)),
    Function(op="Clip", id="clip_from_0", constants=(0.0, 6.0)),
    Function(op="Max", constants=(0.5,)),
    Function(op="Min", constants=(0.5,)),
    Function(op="PRelu", constants=(0.25,)),
    *(
        Function(op="Pow", id=f"pow_{power}", constants=(power,))
        for power in (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, -1.0, -2.0, -3.0, 1.7, -2.5, 40.0)
    ),
    # A square root gives NaN for -inf, where C's pow gives inf, and 0 for 1 over it.
    Function(op="Pow", id="pow_0.5", constants=(0.5,), least=-MOST),
    Function(op="Pow", id="pow_-0.5", constants=(-0.5,), least=-MOST),
]


def network() -> Any:
    nodes, weights = [], []
    for function in FUNCTIONS:
        inputs = ["x"]
        for position, value in enumerate(function.constants):
            inputs.append(f"{function.name}_{position}")
            array = np.array(value if function.op == "Clip" else [value], np.float32)
            weights.append(numpy_helper.from_array(array, inputs[-1]))
        nodes.append(helper.make_node(function.op, inputs, [function.name], **function.attributes))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)
    outputs = [
        helper.make_tensor_value_info(function.name, TensorProto.FLOAT, SHAPE)
        for function in FUNCTIONS
    ]
    graph = helper.make_graph(nodes, "unary", [x], outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(network().SerializeToString(), options)
    results = session.run(None, {"x": DATA})
    return dict(zip((f.name for f in FUNCTIONS), results, strict=True))


def differences(function: Function, actual: np.ndarray, expected: np.ndarray) -> list[str]:
    """Return what is wrong, value by value."""
    with np.errstate(invalid="ignore"):
        # Relative above 1, absolute below, where denormals may be zeros.
        near = np.abs(actual.astype("float64") - expected) <= 1e-6 * np.fmax(np.abs(expected), 1)
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    wrong = ~(near | same | (function.least > DATA))
    first = np.unique(DATA[wrong], return_index=True)[1]
    rows = zip(DATA[wrong][first], actual[wrong][first], expected[wrong][first], strict=True)
    return [f"{function.name}({x:g}) is {y:.9g}, required is {z:.9g}" for x, y, z in rows]


def test_functions_of_one_value_agree_with_onnxruntime_at_the_ends_of_float32(
    target: Target, expected: dict[str, np.ndarray]
) -> None:
    lowered = pipeline.lower(hone.load(network()).module, target, threads=2)
    scheduled = pipeline.schedule(lowered, target, threads=2)
    executable = pipeline.build_executable(scheduled.module, target, threads=2)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    results = machine["main"](tvm.runtime.tensor(DATA))
    found = []
    for function, result in zip(FUNCTIONS, results, strict=True):
        found += differences(function, result.numpy(), expected[function.name])
    assert not found, "\n".join(found)
