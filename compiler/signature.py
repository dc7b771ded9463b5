"""What goes into a compiled model and what comes out: names, dtypes, shapes.

Needs numpy only, because the runtime uses it where no compiler is installed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output.

    Parameters
    ----------
    name : str
        The exact ONNX name.
    dtype : str
        A numpy dtype name, such as ``float32``.
    shape : tuple of int
        Static dimensions.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Inputs and outputs, in the order of the ONNX graph."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the signature as plain JSON data."""

        def specs(tensors: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
            return [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in tensors]

        return {"inputs": specs(self.inputs), "outputs": specs(self.outputs)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        """Read what `to_json` wrote."""

        def specs(rows: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(name=r["name"], dtype=r["dtype"], shape=tuple(r["shape"])) for r in rows
            )

        return cls(inputs=specs(data["inputs"]), outputs=specs(data["outputs"]))

    def check_inputs(self, feeds: Mapping[str, object]) -> None:
        """Check names, dtypes and shapes of one run's inputs.

        Byte order and strides do not matter here: the runtime copies where it must.

        Raises
        ------
        UsageError
            Lists every difference at once.
        """
        problems = [
            f"input {name!r} is unknown"
            for name in feeds
            if name not in {t.name for t in self.inputs}
        ]
        for spec in self.inputs:
            if spec.name not in feeds:
                problems.append(f"input {spec.name!r} is missing")
                continue
            array = feeds[spec.name]
            if not isinstance(array, np.ndarray):
                problems.append(
                    f"input {spec.name!r} is a {type(array).__name__}, not a numpy array"
                )
                continue
            if array.dtype.newbyteorder("=") != np.dtype(spec.dtype):
                problems.append(f"input {spec.name!r} is {array.dtype}, required is {spec.dtype}")
            if array.shape != spec.shape:
                problems.append(f"input {spec.name!r} is {array.shape}, required is {spec.shape}")
        if problems:
            raise UsageError(
                "inputs do not fit the model: " + "; ".join(problems),
                hint="it takes " + ", ".join(map(str, self.inputs)),
            )
