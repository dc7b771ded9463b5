"""Folds moves of channels into the weights of the convolutions that read them.

Rewrites ``relax.nn.conv2d`` and ``hone.conv2d_int8`` with constant weights whose input is put
together by concatenations, splits, slices, transpositions and reshapes of channels, such as the
shuffle of ShuffleNet: the convolution takes the channels in the order in which they lie, with its
weights in that order, from one concatenation of slices. Depthwise convolutions, pooling and
elementwise operators in between keep that order too. Runs after batch normalization is folded and
before the layout changes; running it twice is the same as once. Numerics: sums over channels may be
taken in another order.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Op

from hone.targets.schedule.boxes import MOST_BOXES

from .channel_gather import IMAGE_AXES, ChannelGather, Source, joined, runs
from .channel_operators import (
    channel_axis,
    in_order,
    is_dense_convolution,
    is_free_of_order,
)
from .dataflow import (
    PART,
    Dataflow,
    Rebuilder,
    is_dataflow,
    layer_of,
    shape_of,
    variables,
    with_args,
)

Value = ChannelGather | tuple["Value | None", ...]
"""What a variable holds: channels, or a tuple of tensors."""


@relax.transform.function_pass(opt_level=0)
class FoldChannelMoves:
    """Let convolutions take their input's channels in the order in which they lie."""

    def transform_function(
        self, function: relax.Function, _module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> relax.Function:
        """Return the function with fewer moves, or the very same function."""
        if not is_dataflow(function):
            return function
        writer = _Writer(Dataflow(function))
        return writer.write()


class _Writer:
    """Rewrites one function."""

    def __init__(self, graph: Dataflow) -> None:
        self._graph = graph
        self._builder = Rebuilder(graph.function)
        self._values: dict[relax.Var, Value | None] = {}
        self._axes: dict[relax.Var, int] = {}
        for binding in graph.bindings:
            self._note(binding.var, binding.value)
        self._free = self._find_free()
        self._values.clear()
        self._permuted: set[relax.Var] = set()
        self._made: dict[tuple[object, ...], relax.Var] = {}
        self._changed = False

    def write(self) -> relax.Function:
        """Return the rewritten function; the given one where nothing is gained."""
        for binding in self._graph.bindings:
            var, call = binding.var, binding.value
            if not isinstance(call, relax.Call) or not self._write_operator(var, call):
                self._builder.copy(binding)
                self._note(var, call)
        return self._builder.finish() if self._changed else self._graph.function

    # ------------------------------------------------------------ who minds an order

    def _find_free(self) -> dict[relax.Var, bool]:
        """Return for each variable whether nobody minds the order of its channels."""
        free: dict[relax.Var, bool] = {}
        for binding in reversed(self._graph.bindings):
            users = self._graph.users.get(binding.var, [])
            free[binding.var] = all(
                u is not None and self._is_content(binding.var, u, free) for u in users
            )
        return free

    def _is_content(self, var: relax.Var, user: relax.Var, free: dict[relax.Var, bool]) -> bool:
        """Tell whether who reads a tensor takes its channels in any order."""
        value = self._graph.definition[user]
        if isinstance(value, relax.Call) and any(
            var.same_as(read) for operand in value.args[1:] for read in variables(operand)
        ):
            return False  # Such as a residual, which is added as it lies.
        if isinstance(value, relax.Call) and is_dense_convolution(self._graph, value):
            return self._image(value, channel_axis(value)) is not None
        if not isinstance(value, relax.Call) or value.op in _MOVES:
            return free[user] and self._values[user] is not None
        if not free[user] or not is_free_of_order(self._graph, value):
            return False
        return self._image(value, self._axes.get(user)) is not None

    def _image(self, call: relax.Call, axis: int | None) -> ChannelGather | None:
        """Return the channels of an operator's data where they are those of images."""
        held = self._held(call.args[0])
        if not isinstance(held, ChannelGather) or axis is None:
            return None
        return held if held.is_image(axis) else None

    # ------------------------------------------------------------ what a variable holds

    def _note(self, var: relax.Var, value: relax.Expr) -> None:
        """Remember what a binding that stays as it is gives."""
        self._values[var] = self._moved(value)
        if isinstance(value, relax.Call):
            axis = channel_axis(value)
            if axis is None and is_free_of_order(self._graph, value):
                held = self._held(value.args[0])
                if isinstance(held, ChannelGather):
                    axis = next((a for a in IMAGE_AXES if held.is_image(a)), None)
            if axis is not None:
                self._axes[var] = axis

    def _held(self, expr: relax.Expr) -> Value | None:
        """Return what an expression holds; None for what is not followed."""
        if isinstance(expr, relax.Tuple):
            return tuple(self._held(field) for field in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            whole = self._held(expr.tuple_value)
            return whole[expr.index] if isinstance(whole, tuple) else None
        if not isinstance(expr, relax.Var):
            return None
        value = self._values.get(expr)
        if value is None and isinstance(expr.ty, relax.TensorType) and expr.ty.ndim == 4:
            new = self._builder.use(expr)
            if isinstance(new, relax.Var):
                value = ChannelGather.of(Source(var=new, axis=self._axes.get(expr, 1)))
        return value

    def _moved(self, value: relax.Expr) -> Value | None:
        """Return what a move gives; None for other operators."""
        if not isinstance(value, relax.Call):
            return self._held(value)
        if value.op not in _MOVES:
            return None
        held = self._held(value.args[0])
        if value.op.same_as(_CONCAT):
            parts = [] if not isinstance(held, tuple) else [*held]
            images = [part for part in parts if isinstance(part, ChannelGather)]
            if not parts or len(images) < len(parts) or value.attrs.axis is None:
                return None
            return joined(images, int(value.attrs.axis))
        if not isinstance(held, ChannelGather):
            return None
        if value.op.same_as(_PERMUTE):
            axes = value.attrs.axes
            rank = len(held.axes)
            order = [*range(rank)][::-1] if axes is None else [int(a) % rank for a in axes]
            return held.permuted(order)
        if value.op.same_as(_RESHAPE):
            return held.reshaped(shape_of(value))
        if value.op.same_as(_SPLIT):
            return self._split(held, value)
        return self._slice(held, value)

    def _split(self, held: ChannelGather, call: relax.Call) -> Value | None:
        axis = int(call.attrs.axis)
        extents = [int(field.shape[axis]) for field in call.ty.fields]
        ends = np.cumsum(extents).tolist()
        return tuple(
            held.sliced(axis, range(end - extent, end))
            for extent, end in zip(extents, ends, strict=True)
        )

    def _slice(self, held: ChannelGather, call: relax.Call) -> Value | None:
        given, result = shape_of(call.args[0]), shape_of(call)
        fields = [[int(f.value) for f in argument.fields] for argument in call.args[1:]]
        axes, begins, _, *strides = fields
        if len(axes) != 1 or (strides and strides[0] != [1]):
            return None
        axis = axes[0] % len(given)
        begin = begins[0] + given[axis] if begins[0] < 0 else begins[0]
        return held.sliced(axis, range(begin, begin + result[axis]))

    # ------------------------------------------------------------ operators

    def _write_operator(self, var: relax.Var, call: relax.Call) -> bool:
        """Write an operator on channels in their own order; False where it stays as it is."""
        dense = is_dense_convolution(self._graph, call)
        if not dense and not (self._free[var] and is_free_of_order(self._graph, call)):
            return False
        axis = self._axes.get(var)
        held = self._image(call, axis)
        if held is None or axis is None:
            return False
        order = held.order
        in_place = bool((order == np.arange(len(order))).all())
        permuted = any(source.var in self._permuted for source in held.sources)
        if not permuted and ((in_place and held.moves <= 1) or not self._free[call.args[0]]):
            # Nothing is gained: it is one move, or made anyway for somebody who minds its order.
            return False
        if not permuted and len(runs(held.flat[order])) > MOST_BOXES:
            return False  # So many slices, of channels that occur twice, are no plain copies.
        data = self._materialized(held, axis, layer_of(var))
        arguments = in_order(self._graph, call, axis, order)
        new = self._builder.bind(var, with_args(call, [data, *arguments]))
        self._changed = True
        if not dense and not in_place:
            self._permuted.add(new)
            places = np.empty_like(order)
            places[order] = np.arange(len(order))
            self._values[var] = ChannelGather.of(Source(var=new, axis=axis), places)
        return True

    def _materialized(self, held: ChannelGather, axis: int, name: str) -> relax.Var:
        """Return the channels side by side in the order in which they lie."""
        flat = held.flat[held.order]
        key = (axis, tuple(s.var for s in held.sources), flat.tobytes())
        if key not in self._made:
            parts = [
                self._part(held.sources[source], first, end, axis, f"{name}{PART}slice")
                for source, first, end in runs(flat)
            ]
            self._made[key] = (
                parts[0]
                if len(parts) == 1
                else self._builder.emit(relax.op.concat(parts, axis), f"{name}{PART}concat")
            )
        return self._made[key]

    def _part(self, source: Source, first: int, end: int, axis: int, name: str) -> relax.Var:
        """Return some channels of a source, with channels on an axis."""
        part = source.var
        if (first, end) != (0, source.channels):
            cut = relax.op.strided_slice(part, axes=[source.axis], begin=[first], end=[end])
            part = self._builder.emit(cut, name)
        if source.axis != axis:
            axes = [0, 3, 1, 2] if axis == 1 else [0, 2, 3, 1]
            part = self._builder.emit(relax.op.permute_dims(part, axes), name)
        return part


_CONCAT = Op.get("relax.concat")
_PERMUTE = Op.get("relax.permute_dims")
_RESHAPE = Op.get("relax.reshape")
_SLICE = Op.get("relax.strided_slice")
_SPLIT = Op.get("relax.split")
_MOVES = (_CONCAT, _PERMUTE, _RESHAPE, _SLICE, _SPLIT)
