"""One ONNX node as a converter sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from hone.signature import TensorSpec


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

    def axis(self, default: int = 0, name: str = "axis", rank: int | None = None) -> int:
        """Return an axis attribute, counted from the front."""
        return int(self.attributes.get(name, default)) % (
            len(self.shape()) if rank is None else rank
        )

    def ints(self, index: int, name: str) -> list[int] | None:
        """Return integers that newer opsets take as an input and older ones as an attribute."""
        value = self.value(index)
        if value is None:
            value = self.attributes.get(name)
        return None if value is None else [int(i) for i in np.reshape(value, -1)]


Converter = Callable[[Call], Any]
"""Returns the result, one expression of tuple type or a list for several outputs, or None to leave
the node to TVM's importer."""


def const(value: Any, dtype: str) -> Any:
    """Return a Relax constant."""
    return relax.const(np.asarray(value).astype(dtype), dtype)
