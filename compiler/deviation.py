"""How far tensors are from onnxruntime's, and how far they may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from .importer import source_graph
from .importing.ranges import float_types
from .model import Model
from .rounding import Allowance, is_quantized

TOLERANCE: Final[Mapping[str, float]] = {
    "float64": 1e-4,
    "float32": 1e-4,
    "float16": 2e-2,
    "bfloat16": 1e-1,
}
"""Largest relative error of an output, by the narrowest float type inside the model.

fp32: another order of a sum of n terms moves it by about 2**-24 * sqrt(n) of its largest term
(Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2): 4e-6 for the 4608
terms of ResNet's widest convolution. The worst of the seven reference networks, by kernels that
nothing optimized, is ResNet-50 with 5.7e-6; another order of sums in each of its 50 layers leaves
it below 1e-4.
A wrong attribute or weight moves an output by 1e-2 and more. fp16 and bf16 have 13 and 16 bits
less; errors grow through the layers, which the factor to 2**-11 and 2**-8 leaves room for.
"""


def tolerance(model: Model) -> float:
    """Return the relative error that a model's float types allow, see `TOLERANCE`."""
    if model.source is None:
        return TOLERANCE["float32"]
    return max(TOLERANCE[d] for d in {"float32"} | float_types(source_graph(model.source)))


def relative_error(given: np.ndarray, expected: np.ndarray) -> float:
    """Return how far an array is from a reference.

    Floats: ``max|given - expected| / max|expected|`` over the finite elements, the absolute error
    where the reference is all zero, and infinity where NaN or infinities are in other places.
    Integers and booleans: the share of elements that differ. Another shape is infinitely far.
    With ``given = [1.0, 2.1]`` and ``expected = [1.0, 2.0]`` it is 0.05.
    """
    if given.shape != expected.shape or not expected.size:
        return 0.0 if given.shape == expected.shape else float("inf")
    if not _is_float(expected):
        return float(np.mean(given != expected))
    a, b = given.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    error = float(np.max(np.abs(a[finite] - b[finite])))
    scale = float(np.max(np.abs(b[finite])))
    if not np.isfinite(error):
        return float("inf")
    return error / scale if scale else error


def compare(
    given: np.ndarray, expected: np.ndarray, rtol: float, slack: float | None
) -> tuple[float, float]:
    """Return the relative error of a tensor, and what is allowed.

    Parameters
    ----------
    given, expected : ndarray
        As for `relative_error`.
    rtol : float
        What is allowed for floats; integers must be equal.
    slack : float, optional
        The absolute error that a quantized model's rounding explains; None for another.
    """
    limit = rtol if _is_float(expected) else 0.0
    if slack is None:
        return relative_error(given, expected), limit
    error = relative_error(given.astype(np.float64), expected.astype(np.float64))
    finite = np.abs(expected.astype(np.float64))
    scale = float(np.max(finite, where=np.isfinite(finite), initial=0.0))
    return error, max(limit, slack / scale if scale else slack)


def allowance(model: Model, extra: Sequence[str], threads: int) -> Allowance | None:
    """Return what a quantized model's own rounding explains, None for another model.

    Parameters
    ----------
    model : Model
        With its source.
    extra : sequence of str
        Inner tensors that are compared as well as the outputs.
    threads : int
        Of onnxruntime.
    """
    if model.source is None or not is_quantized(model.source):
        return None
    return Allowance(model.source, extra=extra, threads=threads)


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"
