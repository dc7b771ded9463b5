"""Models that are of float16 themselves, from ONNX to numbers, against numpy in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

import hone
from hone import pipeline
from hone.targets.target import Target

Oracle = Callable[..., np.ndarray]


def attended(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True) @ value


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    groups = x.shape[1] // weight.shape[1]
    parts = []
    for data, own in zip(np.split(x, groups, 1), np.split(weight, groups), strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(data, own.shape[2:], axis=(2, 3))
        parts.append(np.einsum("nchwrs,kcrs->nkhw", windows, own))
    return np.concatenate(parts, 1) + bias[:, None, None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator; the operands from ``given`` on are constants."""

    id: str
    shapes: tuple[tuple[int, ...], ...]
    oracle: Oracle
    given: int = 9
    op: str = "MatMul"
    roundings: int = 1
    attributes: dict[str, Any] = field(default_factory=dict)


CONV = ((1, 6, 9, 7), (10, 6, 3, 3), (10,))
CASES = [
    Case(id="weights", shapes=((2, 3, 5, 8), (8, 19)), oracle=np.matmul, given=1),
    Case(id="weights, odd depth", shapes=((5, 301), (301, 16)), oracle=np.matmul, given=1),
    Case(id="a row and weights", shapes=((8,), (8, 16)), oracle=np.matmul, given=1),
    Case(id="many weights", shapes=((2, 5, 8), (2, 8, 16)), oracle=np.matmul, given=1),
    Case(id="two computed", shapes=((5, 8), (8, 16)), oracle=np.matmul),
    Case(id="a batch computed", shapes=((2, 3, 5, 8), (2, 3, 8, 7)), oracle=np.matmul),
    Case(id="broadcast", shapes=((2, 3, 5, 8), (3, 8, 7)), oracle=np.matmul),
    Case(
        id="Gemm",
        op="Gemm",
        shapes=((5, 40), (16, 40), (16,)),
        oracle=lambda a, b, c: a @ b.T + c,
        given=1,
        roundings=2,
        attributes={"transB": 1},
    ),
    Case(id="Conv", op="Conv", shapes=CONV, oracle=convolved, given=1, roundings=2),
    Case(id="Conv, computed", op="Conv", shapes=CONV, oracle=convolved, roundings=2),
    Case(
        id="Conv, depthwise",
        op="Conv",
        shapes=((2, 6, 9, 7), (6, 1, 3, 3), (6,)),
        oracle=convolved,
        given=1,
        roundings=2,
        attributes={"group": 6},
    ),
    Case(
        id="Attention",
        op="Attention",
        shapes=((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
        oracle=attended,
        roundings=8,
    ),
]


def model(case: Case, arrays: list[np.ndarray]) -> Any:
    names = [f"x{i}" for i in range(len(arrays))]
    node = helper.make_node(case.op, names, ["y"], name="a", **case.attributes)
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, array.shape)
        for name, array in zip(names[: case.given], arrays, strict=False)
    ]
    weights = [
        numpy_helper.from_array(array, name)
        for name, array in list(zip(names, arrays, strict=True))[case.given :]
    ]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    graph = helper.make_graph([node], "g", inputs, [result], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_sums_are_float32_and_the_result_is_rounded_once(
    case: Case, target: Target, rng: np.random.Generator
) -> None:
    arrays = [rng.standard_normal(shape).astype("float16") for shape in case.shapes]
    imported = hone.load(model(case, arrays))
    lowered = pipeline.lower(imported.module, target, threads=2)
    scheduled = pipeline.schedule(lowered, target, threads=2)
    executable = pipeline.build_executable(scheduled.module, target, threads=2)
    virtual = relax.VirtualMachine(executable, tvm.cpu())
    actual = virtual["main"](*[tvm.runtime.tensor(a) for a in arrays[: case.given]]).numpy()
    assert actual.dtype == np.float16
    exact = case.oracle(*[array.astype("float64") for array in arrays])
    # A rounding is off by 2**-11 of what is rounded, which before a bias is not the result.
    unit = 1.01 * 2.0**-11 * case.roundings
    atol = 1e-5 if case.roundings == 1 else unit * 4
    np.testing.assert_allclose(actual.astype("float64"), exact, rtol=unit, atol=atol)
