"""Keeps the weights of few bits that an imported model has, where only weights are quantized.

Rewrites each ``relax.matmul`` and ``relax.take`` whose matrix is a dequantized constant, or the
constant's transpose: ``hone.decode_weights`` of the same levels takes its place, in the fewest bits
that hold them. Decoded weights that no packed kernel can read become float32 constants. Runs after
`match_qdq`, which takes the layers whose inputs are quantized as well, and before constants are
folded. Numerics: the layer's weights are exactly the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst, Op

from hone.passes.graph.dataflow import (
    Dataflow,
    Rebuilder,
    is_dataflow,
    layer_of,
    shape_of,
    with_args,
)

from .decode_operator import TABLE_MODES, Decoded, decode_call
from .given_levels import given_levels
from .operators import NAMES as NAMES  # registers the operators
from .site import Skipped
from .type_inference import LEVEL_TYPES


@dataclass(frozen=True, kw_only=True)
class WeightPacking:
    """A module with the model's own weights of few bits.

    Parameters
    ----------
    module : IRModule
        The result.
    packed : mapping of str to int
        Layer → bits of its levels, in graph order.
    skipped : tuple of Skipped
        Layers whose dequantized weights become float32, with the reason.
    """

    module: tvm.IRModule
    packed: Mapping[str, int]
    skipped: tuple[Skipped, ...]


def pack_weights(module: tvm.IRModule) -> WeightPacking:
    """Pack the dequantized weights of a module, and report what was done.

    Parameters
    ----------
    module : IRModule
        After `match_qdq`; stays as it is.

    Returns
    -------
    WeightPacking
        The very same module where it has no dequantized weights, or is not one dataflow block.
    """
    function = module["main"]
    if not is_dataflow(function):
        return WeightPacking(module=module, packed={}, skipped=())
    graph = Dataflow(function)
    sites: dict[relax.Var, Decoded] = {}
    skipped: list[Skipped] = []
    for binding in graph.bindings:
        call = graph.call(binding.var)
        found = None if call is None else _packed(graph, call)
        if isinstance(found, Decoded):
            sites[binding.var] = found
        elif found is not None:
            skipped.append(Skipped(layer_of(binding.var), found))
    constant = {
        binding.var
        for binding in graph.bindings
        if decode_call(binding.value) is not None and _is_read(graph, binding.var, sites)
    }
    packed = {layer_of(var): site.levels.bits for var, site in sites.items()}
    if not constant and all(_is_direct(graph, var) for var in sites):
        return WeightPacking(module=module, packed=packed, skipped=tuple(skipped))
    builder = Rebuilder(function)
    for binding in graph.bindings:
        var, call = binding.var, graph.call(binding.var)
        if call is not None and var in sites:
            position = _POSITIONS[call.op]
            arguments = [builder.use(argument) for argument in call.args]
            weight = sites[var].call()
            arguments[position] = builder.emit(weight, f"{layer_of(var)}@weight")
            builder.bind(var, with_args(call, arguments))
        elif call is not None and var in constant:
            builder.bind(var, relax.const(Decoded.of(call).real(), "float32"))
        else:
            builder.copy(binding)
    rewritten = module.clone()
    rewritten.update_func(module.get_global_var("main"), builder.finish())
    return WeightPacking(module=rewritten, packed=packed, skipped=tuple(skipped))


@tvm.transform.module_pass(opt_level=0)
class PackWeights:
    """`pack_weights` as a pass."""

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with the model's own weights of few bits."""
        return pack_weights(module).module


def _packed(graph: Dataflow, call: relax.Call) -> Decoded | str | None:
    """Return the weight of a layer as its kernel decodes it, or why not; None for another call."""
    if call.op in _OTHER and _dequantized(graph, call.args[1], 0) is not None:
        return f"there is no packed kernel for {str(call.op.name).rpartition('.')[2]}"
    if call.op not in _POSITIONS:
        return None
    channel = 1 if call.op == _MATMUL else 0
    found = _dequantized(graph, call.args[_POSITIONS[call.op]], channel)
    if not isinstance(found, Decoded):
        return found
    if str(call.ty.dtype) != "float32":
        return f"the layer computes in {call.ty.dtype}, packed kernels in float32"
    if call.op == _MATMUL:
        return found if len(shape_of(call.args[0])) >= 2 else "a vector has no packed kernel"
    axis = call.attrs.axis
    if axis is None or int(axis) % 2 != 0 or str(call.attrs.mode) not in TABLE_MODES:
        return "only whole rows are looked up in a packed table"
    return found


def _dequantized(graph: Dataflow, expr: relax.Expr, channel: int) -> Decoded | str | None:
    """Return dequantized constants as a matrix of output channels ``channel``.

    Or the reason why they are none that a kernel can decode; None for any other expression.
    """
    call = graph.call(graph.resolve(expr))
    if call is None:
        return None
    rank = len(shape_of(call))
    if call.op in (_PERMUTE, _RESHAPE):
        is_transpose = call.op == _PERMUTE and rank == 2 and _swaps(call)
        inner = _dequantized(graph, call.args[0], 1 - channel if is_transpose else channel)
        if inner is None:
            return None
        if rank != 2:
            return f"weights of {rank} axes have no packed kernel"
        if not is_transpose:
            return "its weights are reshaped after they are dequantized"
        if isinstance(inner, str):
            return inner
        return Decoded(levels=inner.levels, shape=inner.shape[::-1], axis=channel)
    if decode_call(call) is not None:
        given = Decoded.of(call)
        if given.axis == channel:
            return given
        return "its blocks lie along the output channels; packed kernels sum along a block"
    if call.op not in (_DEQUANTIZE, _DEQUANTIZE_AXIS):
        return None
    if not all(isinstance(argument, GenericConst) for argument in call.args):
        return None
    levels, scale, zero_point = (np.asarray(argument.value.numpy()) for argument in call.args)
    if str(levels.dtype) not in LEVEL_TYPES:
        return f"its weights are {levels.dtype}, not 8 bits or less"
    if rank != 2:
        return f"weights of {rank} axes have no packed kernel"
    if call.op == _DEQUANTIZE_AXIS and int(call.attrs.axis) % rank != channel:
        return "its weights have one scale for each input channel"
    matrix = levels if channel == 0 else levels.T
    found = given_levels(
        matrix, scale.reshape(-1, 1), zero_point.reshape(-1, 1), group=matrix.shape[1]
    )
    if isinstance(found, str):
        return found
    return Decoded(levels=found, shape=tuple(levels.shape), axis=channel)


def _swaps(call: relax.Call) -> bool:
    axes = call.attrs.axes
    return axes is None or [int(axis) % 2 for axis in axes] == [1, 0]


def _is_direct(graph: Dataflow, var: relax.Var) -> bool:
    """Tell whether a layer with a packed weight reads it as it should already."""
    call = graph.definition[var]
    weight = graph.call(graph.resolve(call.args[_POSITIONS[call.op]]))
    return weight is not None and decode_call(weight) is not None


def _is_read(graph: Dataflow, var: relax.Var, sites: Mapping[relax.Var, Decoded]) -> bool:
    """Tell whether a decoded weight, or its transpose, is read where nothing can decode it."""
    for user in graph.users.get(var, []):
        call = None if user is None else graph.call(user)
        if user in sites or (call is not None and call.op == _CONV2D):
            continue
        if call is None or call.op != _PERMUTE or not isinstance(user, relax.DataflowVar):
            return True
        if _is_read(graph, user, sites):
            return True
    return False


_CONV2D = Op.get("relax.nn.conv2d")
_MATMUL, _TAKE = Op.get("relax.matmul"), Op.get("relax.take")
_POSITIONS = {_MATMUL: 1, _TAKE: 0}
"""Which argument of a layer is its matrix."""
_OTHER = tuple(
    Op.get(f"relax.nn.{name}")
    for name in ("conv1d", "conv2d", "conv3d", *(f"conv{n}d_transpose" for n in (1, 2, 3)))
)
_PERMUTE, _RESHAPE = Op.get("relax.permute_dims"), Op.get("relax.reshape")
_DEQUANTIZE, _DEQUANTIZE_AXIS = Op.get("hone.dequantize"), Op.get("relax.dequantize")
