"""hone's own conversions of ONNX operators, where TVM's are wrong or opaque.

Every shape is static here and constants are folded, so that most operators become one Relax
operator. None of these uses ``call_tir``, which hides an operator from layout conversion, fusion
and training. An operator that is not listed is converted by TVM's importer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from tvm import relax

from .signature import TensorSpec

op = relax.op


@dataclass(frozen=True, kw_only=True)
class Call:
    """One ONNX node to convert.

    Parameters
    ----------
    bb : relax.BlockBuilder
        Inside a dataflow block.
    inputs : sequence of relax.Expr or None
        None where an input is left out.
    values : sequence of ndarray or None
        The inputs' values where they are constant.
    attributes : mapping
        By name, strings decoded.
    outputs : sequence of TensorSpec
        Those that are not left out.
    opset : int
        Of the default domain.
    """

    bb: relax.BlockBuilder
    inputs: Sequence[Any]
    values: Sequence[np.ndarray | None]
    attributes: Mapping[str, Any]
    outputs: Sequence[TensorSpec]
    opset: int

    def input(self, index: int) -> Any:
        """Return an input, None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def value(self, index: int) -> np.ndarray | None:
        """Return an input's constant value, None where it has none."""
        return self.values[index] if index < len(self.values) else None

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """Return an input's shape."""
        return tuple(int(d) for d in self.inputs[index].ty.shape)

    def dtype(self, index: int = 0) -> str:
        """Return an input's dtype."""
        return str(self.inputs[index].ty.dtype)


Converter = Callable[[Call], Any]
"""Returns the result, one expression of tuple type or a list for several outputs, or None to leave
the node to TVM's importer."""


def _const(value: Any, dtype: str) -> Any:
    return relax.const(value, dtype)


def _reshape(call: Call) -> Any:
    shape = call.outputs[0].shape
    return call.inputs[0] if shape == call.shape() else op.reshape(call.inputs[0], shape)


def _identity(call: Call) -> Any:
    return call.inputs[0]


def _clip(call: Call) -> Any:
    """``min(max(x, low), high)``; relu where low is 0, which fuses and trains everywhere."""
    x, dtype = call.inputs[0], call.dtype()
    if call.opset < 11:
        bounds = [call.attributes.get("min"), call.attributes.get("max")]
        low, high = (None if b is None else np.asarray(b) for b in bounds)
    else:
        if any(call.input(i) is not None and call.value(i) is None for i in (1, 2)):
            return None
        low, high = call.value(1), call.value(2)
    if low is not None and not np.isnan(low):
        zero = float(low) == 0 and np.issubdtype(np.dtype(dtype), np.floating)
        x = op.nn.relu(x) if zero else op.maximum(x, _const(low.item(), dtype))
    if high is not None and not np.isnan(high):
        x = op.minimum(x, _const(high.item(), dtype))
    return x


CONVERTERS: Final[Mapping[str, Converter]] = {
    "Clip": _clip,
    "Dropout": _identity,
    "Flatten": _reshape,
    "Identity": _identity,
    "Reshape": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
}
"""By operator of the default domain."""
