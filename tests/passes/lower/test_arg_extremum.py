"""Argmax and argmin: the first of equal elements, NaN and infinities as in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper
from tvm import relax

RunOp = Callable[..., tuple[np.ndarray, list[str]]]


def required(op: str, x: np.ndarray, axis: int, *, keepdims: bool) -> np.ndarray:
    node = helper.make_node(op, ["x"], ["y"], axis=axis, keepdims=int(keepdims))
    graph = helper.make_graph(
        [node],
        "arg",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_empty_tensor_value_info("y")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    return np.asarray(result)


@pytest.mark.parametrize("keepdims", [True, False], ids=["kept", "dropped"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 67), -1), ((2, 19, 37), 1), ((5, 128), 0), ((1000,), 0), ((2, 1, 3), 1), ((1, 7), 0)],
    ids=str,
)
def test_index_equals_numpy_with_ties(
    shape: tuple[int, ...], axis: int, keepdims: bool, run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.integers(-3, 4, shape).astype("float32")
    for name in ("argmax", "argmin"):
        actual, rules = run_op(
            lambda v, name=name: getattr(relax.op, name)(v, axis, keepdims=keepdims), x
        )
        assert actual.dtype == np.int64
        assert rules[0] in ("rows", "columns", "generic")
        np.testing.assert_array_equal(actual, getattr(np, name)(x, axis, keepdims=keepdims))


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
def test_index_beside_nan_and_infinities_is_that_of_onnxruntime(
    op: str, axis: int, run_op: RunOp, rng: np.random.Generator
) -> None:
    row = rng.standard_normal(43).astype("float32")
    row[7], row[8] = 9, -9
    rows = []
    for at in ([], [0], [3], [7], [8], [42], [0, 7], range(43), range(42), range(1, 43)):
        rows.append(row.copy())
        rows[-1][list(at)] = np.nan
    rows += [np.full(43, value, "float32") for value in (np.inf, -np.inf)]
    x = np.stack(rows)
    x = x if axis else np.ascontiguousarray(x.T)
    actual, _ = run_op(lambda v: getattr(relax.op, op.lower())(v, axis, keepdims=False), x)
    np.testing.assert_array_equal(actual, required(op, x, axis, keepdims=False))
