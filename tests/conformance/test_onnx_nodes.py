"""onnx's own node tests through the importer: equal, or refused with a reason; never wrong.

``onnx_nodes.txt`` holds the outcome of each. It is a contract: a test that is refused there may
become equal, but then the file says so. ``python tests/conformance/test_onnx_nodes.py`` writes it
anew. Tests of functions that are expanded by onnx are left out, they repeat the operators.
"""

from __future__ import annotations

import functools
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

from hone import importer, shadow
from hone.errors import ModelError

OUTCOMES = Path(__file__).with_name("onnx_nodes.txt")

# A kernel may sum in another order than onnx's numpy reference does, and rounds each step to the
# tensor's own type: fp16 has 11 bits, bf16 has 8.
TOLERANCE = {"float16": 1e-2, "bfloat16": 5e-2}


@functools.cache
def cases() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the references divide by zero on purpose
        found = load_model_tests(kind="node")
    return {c.name.removeprefix("test_"): c for c in found if "_expanded" not in c.name}


def recorded() -> dict[str, str]:
    lines = OUTCOMES.read_text().splitlines()
    return dict(line.split() for line in lines if line and not line.startswith("#"))


def array(value: Any) -> Any:
    if isinstance(value, np.generic):
        return np.asarray(value)
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def with_constants(model: onnx.ModelProto, values: list[Any]) -> onnx.ModelProto:
    """Return the model with all inputs but the first as weights: shapes, axes, pads."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    pairs = zip(list(copy.graph.input)[1:], values[1:], strict=False)
    copy.graph.initializer.extend(numpy_helper.from_array(v, i.name) for i, v in pairs)
    return copy


def load(model: onnx.ModelProto, values: list[Any]) -> tuple[Any, str]:
    try:
        return importer.load(model), "equal"
    except ModelError:
        if len(values) < 2 or not all(
            isinstance(v, np.ndarray) and v.dtype != object for v in values
        ):
            return None, "refused"
    try:
        return importer.load(with_constants(model, values)), "constant"
    except ModelError:
        return None, "refused"


def difference(given: np.ndarray, expected: np.ndarray) -> str | None:
    if (given.dtype, given.shape) != (expected.dtype, expected.shape):
        return f"{given.dtype}{given.shape} instead of {expected.dtype}{expected.shape}"
    if expected.dtype.kind in "iub":
        return None if np.array_equal(given, expected) else "other integers"
    rtol = TOLERANCE.get(expected.dtype.name, 1e-3)  # onnx's own default
    equal = np.allclose(
        given.astype(np.float64), expected.astype(np.float64), rtol, rtol / 100, equal_nan=True
    )
    return None if equal else "other values"


def outcome(name: str) -> str:
    """Return ``equal``, ``constant`` (equal with constant parameters), ``refused`` or the error."""
    case = cases()[name]
    inputs, outputs = ([array(v) for v in values] for values in case.data_sets[0])
    model, kind = load(case.model, inputs)
    if model is None:
        return kind
    names = [i.name for i in case.model.graph.input]
    wanted = {s.name for s in model.signature.inputs}
    feeds = {n: v for n, v in zip(names, inputs, strict=True) if n in wanted}
    results, _ = shadow.evaluate(model.module, feeds)
    for given, expected in zip(results, outputs, strict=True):
        wrong = difference(given, np.asarray(expected))
        if wrong:
            return wrong
    return kind


@pytest.mark.parametrize("name", recorded())
def test_node_is_equal_or_refused_as_recorded(name):
    if name not in cases():
        pytest.skip(f"onnx {onnx.__version__} has no such test")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy, where a reference divides by zero
        assert outcome(name) == recorded()[name]


def test_no_recorded_outcome_is_wrong():
    kinds = set(recorded().values())
    assert kinds == {"equal", "constant", "refused"}


def test_the_comparer_sees_differences():
    ones = np.ones((2, 3), np.float32)
    assert difference(ones, ones) is None
    assert difference(ones.astype(np.float64), ones) is not None
    assert difference(ones[0], ones) is not None
    assert difference(ones * 1.01, ones) == "other values"
    assert difference(ones * np.nan, ones) == "other values"
    assert difference(np.arange(3), np.arange(3)[::-1]) == "other integers"


if __name__ == "__main__":
    found = {name: outcome(name) for name in cases()}
    counts = {kind: list(found.values()).count(kind) for kind in sorted(set(found.values()))}
    sys.stdout.write(f"# onnx {onnx.__version__}: {counts}\n")
    sys.stdout.writelines(f"{name} {kind}\n" for name, kind in sorted(found.items()))
