"""What each layer of a model costs: multiply-adds, parameters, shape; counted in Relax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hone.importing.layer_names import PART

if TYPE_CHECKING:
    from tvm import relax

    from hone.model import Model


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """The size of one layer.

    Parameters
    ----------
    id : str
        Of the layer.
    op_type : str
        ONNX operator.
    dtype : str or None
        Of its result; None where the layer was folded away or has several results.
    shape : tuple of int or None
        Of its result.
    macs : int
        Multiply-adds of its convolutions and matrix products; everything else counts as none.
    parameters : int
        Elements of its constant tensors; scalars do not count.
    """

    id: str
    op_type: str
    dtype: str | None
    shape: tuple[int, ...] | None
    macs: int
    parameters: int


def layer_costs(model: Model) -> tuple[LayerCost, ...]:
    """Return the cost of every layer, in the order of the graph.

    Parameters
    ----------
    model : Model
        Its module may have been compressed; layers that a pass removed cost nothing.
    """
    from tvm import relax

    macs: dict[str, int] = {}
    parameters: dict[str, int] = {}
    results: dict[str, tuple[str, tuple[int, ...]]] = {}
    for block in model.module["main"].body.blocks:
        for binding in block.bindings:
            name = str(binding.var.name)
            layer = name.split(PART)[0]
            if isinstance(binding.var.ty, relax.TensorType) and binding.var.ty.shape is not None:
                results[name] = str(binding.var.ty.dtype), _shape(binding.var)
            if isinstance(binding.value, relax.Call):
                macs[layer] = macs.get(layer, 0) + _macs(binding.value, binding.var)
                found = sum(_elements(argument) for argument in binding.value.args)
                parameters[layer] = parameters.get(layer, 0) + found
    return tuple(
        LayerCost(
            id=layer.id,
            op_type=layer.op_type,
            dtype=results[layer.binding][0] if layer.binding in results else None,
            shape=results[layer.binding][1] if layer.binding in results else None,
            macs=macs.get(layer.binding, 0),
            parameters=parameters.get(layer.binding, 0),
        )
        for layer in model.layers
    )


def _shape(value: relax.Expr) -> tuple[int, ...]:
    return tuple(int(extent) for extent in value.ty.shape)


def _elements(value: relax.Expr) -> int:
    """Return the elements of a constant that is no scalar, or of a tuple of such."""
    import tvm
    from tvm import relax

    if isinstance(value, relax.Tuple):
        return sum(_elements(field) for field in value.fields)
    if isinstance(value, tvm.ir.GenericConst) and len(value.value.shape):
        return math.prod(int(extent) for extent in value.value.shape)
    return 0


def _macs(call: relax.Call, result: relax.Var) -> int:
    """Return the multiply-adds of a convolution or a matrix product, else 0.

    Convolution: ``prod(output) × prod(weight) / output channels``; transposed:
    ``prod(input) × prod(weight) / input channels``; matrix product: ``prod(output) × depth``.
    """
    import tvm

    if not isinstance(call.op, tvm.ir.Op):
        return 0
    name = str(call.op.name)
    if name == "relax.matmul":
        return math.prod(_shape(result)) * _shape(call.args[0])[-1]
    if name == "hone.dense_int8":
        return math.prod(_shape(result)) * _shape(call.args[1])[-1]
    if name == "hone.conv2d_int8":
        return math.prod(_shape(result)) * math.prod(_shape(call.args[1])[1:])
    if not name.startswith("relax.nn.conv"):
        return 0
    weight = math.prod(_shape(call.args[1]))
    if name.endswith("_transpose"):
        channels = _extent(call.args[0], str(call.attrs.data_layout))
        return math.prod(_shape(call.args[0])) * weight // channels
    layout = str(call.attrs.out_layout) or str(call.attrs.data_layout)
    return math.prod(_shape(result)) * weight // _extent(result, layout)


def _extent(value: relax.Expr, layout: str) -> int:
    """Return the number of channels of a tensor in a layout such as ``NCHW``."""
    shape: Sequence[int] = _shape(value)
    return shape[layout.index("C")]
