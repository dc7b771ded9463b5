"""The first layer at which a model leaves what onnxruntime computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .deviation import allowance, compare, tolerance
from .importing.layer_names import node_ids, part
from .importing.qdq import rewrite
from .model import Layer, Model
from .reference import reference


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first layer that differs from onnxruntime's.

    Parameters
    ----------
    layer, op_type, binding : str
        The layer's id, ONNX operator and Relax binding.
    relative_error, tolerance : float
        As in `hone.parity.OutputError`.
    index : tuple of int
        Where it differs most.
    given, expected : float
        The values there.
    layers_equal : int
        How many layers before it were compared and agree.
    """

    layer: str
    op_type: str
    binding: str
    relative_error: float
    tolerance: float
    index: tuple[int, ...]
    given: float
    expected: float
    layers_equal: int

    def __str__(self) -> str:
        return (
            f"the first layer that differs is {self.op_type} {self.layer!r}: relative error "
            f"{self.relative_error:.1e}, at {list(self.index)} it is {self.given:.6g}, "
            f"onnxruntime's is {self.expected:.6g}; {self.layers_equal} layers before it agree"
        )


def first_divergence(
    model: Model,
    inputs: Mapping[str, np.ndarray],
    *,
    rtol: float | None = None,
    threads: int = 2,
) -> Divergence | None:
    """Return the first layer of a model's un-fused module that differs from onnxruntime's.

    Parameters
    ----------
    model : Model
        With its source.
    inputs : mapping of str to ndarray
        Of one run.
    rtol : float, optional
        As in `hone.parity.check`.
    threads : int
        Of onnxruntime.

    Returns
    -------
    Divergence or None
        None when every layer agrees.

    Raises
    ------
    NotCheckedError
        onnxruntime cannot run the model.
    """
    from .shadow import evaluate

    rtol = tolerance(model) if rtol is None else rtol
    tensors = _tensors(model)
    names = [name for _, name, _ in tensors]
    expected = reference(model, extra=names, threads=threads).run(inputs)
    explained = allowance(model, names, threads)
    slack = {} if explained is None else explained.of(inputs, expected)
    _, given = evaluate(model.module, inputs, [binding for _, _, binding in tensors])
    equal = 0
    for layer, name, binding in tensors:
        if binding not in given or given[binding].shape != expected[name].shape:
            continue  # folded, or a pass gave it another shape: its consumers are compared
        error, allowed = compare(given[binding], expected[name], rtol, slack.get(name))
        if error <= allowed:
            equal += 1
            continue
        index = _worst_index(given[binding], expected[name])
        return Divergence(
            layer=layer.id,
            op_type=layer.op_type,
            binding=binding,
            relative_error=error,
            tolerance=allowed,
            index=index,
            given=float(given[binding][index]),
            expected=float(expected[name][index]),
            layers_equal=equal,
        )
    return None


def _worst_index(given: np.ndarray, expected: np.ndarray) -> tuple[int, ...]:
    a, b = given.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        distance = np.abs(a - b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    distance = np.where(same, 0.0, np.where(np.isnan(distance), np.inf, distance))
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(distance)), distance.shape))


def _tensors(model: Model) -> list[tuple[Layer, str, str]]:
    """Return layer, ONNX tensor and binding of every result of every layer."""
    if model.source is None:
        return []
    layers = {layer.id: layer for layer in model.layers}
    computed = {name for node in model.source.graph.node for name in node.output}
    nodes = rewrite(model.source).graph.node
    ids = node_ids((n.name, n.op_type, next(iter(n.output), "")) for n in nodes)
    return [
        (layers[i], name, part(layers[i].binding, str(k)) if k else layers[i].binding)
        for i, node in zip(ids, nodes, strict=True)
        if i in layers
        for k, name in enumerate(o for o in node.output if o)
        if name in computed  # what a quantized operator was rewritten to has tensors of its own
    ]
