"""A graph under construction: readable unique names, seeded parameters, shapes known throughout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hone.models.moments import Moments

OPSET = 17
IR_VERSION = 8  # the one that came with opset 17 (onnx 1.12): every runtime in use reads it


@dataclass(frozen=True, kw_only=True)
class Value:
    """A tensor of the graph.

    Parameters
    ----------
    name : str
        Its ONNX value name.
    shape : tuple of int
        Its static shape.
    dtype : int
        Its ONNX element type.
    moments : Moments, optional
        Expected moments per channel, where they are followed (convolutional networks).
    """

    name: str
    shape: tuple[int, ...]
    dtype: int = TensorProto.FLOAT
    moments: Moments | None = None


class GraphBuilder:
    """Collects nodes and parameters and makes an ONNX model of them.

    Node names follow the scopes as a PyTorch export's do (``/layer1/0/conv1/Conv``), parameters
    the dotted form (``layer1.0.conv1.weight``); a second node of one type in one scope gets ``_1``.

    Parameters
    ----------
    name : str
        Name of the graph.
    seed : int
        Seed of `rng`.
    """

    def __init__(self, name: str, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self._name = name
        self._scope: list[str] = []
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._node_names: set[str] = set()

    @contextmanager
    def scope(self, *names: str) -> Iterator[None]:
        """Put the nodes and parameters that are made inside under `names`."""
        self._scope.extend(names)
        try:
            yield
        finally:
            del self._scope[len(self._scope) - len(names) :]

    def input(
        self,
        name: str,
        shape: Sequence[int],
        *,
        dtype: int = TensorProto.FLOAT,
        moments: Moments | None = None,
    ) -> Value:
        """Declare a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return Value(name=name, shape=tuple(shape), dtype=dtype, moments=moments)

    def parameter(self, name: str, array: NDArray[Any]) -> str:
        """Store an initializer under the current scope and return its full name."""
        full = ".".join([*self._scope, name])
        if full in self._initializers:
            raise ValueError(f"parameter {full!r} exists already")
        self._initializers[full] = numpy_helper.from_array(array, full)
        return full

    def normal(self, shape: Sequence[int], std: float, mean: float = 0.0) -> NDArray[np.float32]:
        """Draw normal values, float32."""
        draw = self.rng.standard_normal(tuple(shape), dtype=np.float32)
        return draw * np.float32(std) + np.float32(mean)

    def he(self, shape: Sequence[int], fan_in: int) -> NDArray[np.float32]:
        """Draw He-normal weights: standard deviation √(2 / fan_in) (He et al., ICCV 2015)."""
        return self.normal(shape, (2.0 / fan_in) ** 0.5)

    def uniform(self, shape: Sequence[int], low: float, high: float) -> NDArray[np.float32]:
        """Draw uniform values in [low, high), float32."""
        return self.rng.uniform(low, high, tuple(shape)).astype(np.float32)

    def nodes(
        self,
        op_type: str,
        inputs: Sequence[Value | str],
        shapes: Sequence[Sequence[int]],
        *,
        dtype: int = TensorProto.FLOAT,
        moments: Moments | None = None,
        **attributes: Any,
    ) -> tuple[Value, ...]:
        """Append a node with one output per shape."""
        name = self._unique("/" + "/".join([*self._scope, op_type]))
        values = tuple(
            Value(name=f"{name}_output_{i}", shape=tuple(shape), dtype=dtype, moments=moments)
            for i, shape in enumerate(shapes)
        )
        self._nodes.append(
            helper.make_node(
                op_type,
                [i if isinstance(i, str) else i.name for i in inputs],
                [value.name for value in values],
                name=name,
                **attributes,
            )
        )
        return values

    def node(
        self,
        op_type: str,
        inputs: Sequence[Value | str],
        shape: Sequence[int],
        *,
        dtype: int = TensorProto.FLOAT,
        moments: Moments | None = None,
        **attributes: Any,
    ) -> Value:
        """Append a node with one output."""
        return self.nodes(op_type, inputs, [shape], dtype=dtype, moments=moments, **attributes)[0]

    def model(self, outputs: Mapping[str, Value]) -> onnx.ModelProto:
        """Name the outputs and make the model.

        Parameters
        ----------
        outputs : mapping of str to Value
            Name of each graph output → the value (the result of a node) that gets it.

        Raises
        ------
        onnx.checker.ValidationError
            If the graph is not valid ONNX.
        """
        renamed = {value.name: name for name, value in outputs.items()}
        for node in self._nodes:
            node.input[:] = [renamed.get(i, i) for i in node.input]
            node.output[:] = [renamed.get(o, o) for o in node.output]
        graph = helper.make_graph(
            self._nodes,
            self._name,
            self._inputs,
            [
                helper.make_tensor_value_info(name, value.dtype, list(value.shape))
                for name, value in outputs.items()
            ],
            initializer=list(self._initializers.values()),
        )
        model = helper.make_model(
            graph,
            producer_name="hone.models",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def _unique(self, name: str) -> str:
        unique, count = name, 0
        while unique in self._node_names:
            count += 1
            unique = f"{name}_{count}"
        self._node_names.add(unique)
        return unique
