"""Operators that move levels or pick among them, and never change what a level means.

Shapes, transpositions, slices, resizing to the nearest, maximum pooling and clipping work on levels
as they are, because levels are in the order of the real values. Numerics: exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm import relax
from tvm.ir import Op

from hone.passes.graph.dataflow import Dataflow, Rebuilder, layer_of, shape_of, with_args

from .level_layouts import Layout, LevelLayouts, LevelTensor
from .qdq_layers import bounds_of
from .qdq_reader import levels_of_dequantize

Source = Callable[[relax.Var], LevelTensor]
"""Returns the level tensor that a ``hone.dequantize`` reads, by the variable it reads."""


class LevelMoves:
    """Follows real values back through moves to a dequantization, and repeats the moves on levels.

    Parameters
    ----------
    graph : Dataflow
        The original function.
    rebuilder : Rebuilder
        Where moves are written.
    layouts : LevelLayouts
        Of the level tensors.
    """

    def __init__(self, graph: Dataflow, rebuilder: Rebuilder, layouts: LevelLayouts) -> None:
        self._graph = graph
        self._rebuilder = rebuilder
        self._layouts = layouts
        self._moved: dict[relax.Var, LevelTensor] = {}

    def has_levels(self, expr: relax.Expr) -> bool:
        """Tell whether an expression is the real value of levels, or of moved ones."""
        call = self._graph.call(self._graph.resolve(expr))
        if call is None:
            return False
        if levels_of_dequantize(call) is not None:
            return True
        return _keeps_levels(call) and self.has_levels(_moved_argument(call))

    def is_moved(self, expr: relax.Expr) -> bool:
        """Tell whether an expression is dequantized, or moved without being clipped."""
        call = self._graph.call(self._graph.resolve(expr))
        return call is not None and bounds_of(call) is None and self.has_levels(expr)

    def levels(self, expr: relax.Expr, source: Source) -> LevelTensor:
        """Return the levels of an expression for which `has_levels` holds."""
        var = self._graph.resolve(expr)
        if var not in self._moved:
            call = self._graph.definition[var]
            levels = levels_of_dequantize(call)
            if levels is not None:
                given = source(call.args[0])
                self._moved[var] = LevelTensor(var=given.var, layout=given.layout, levels=levels)
            else:
                self._moved[var] = self._move(var, call, source)
        return self._moved[var]

    def _move(self, var: relax.Var, call: relax.Call, source: Source) -> LevelTensor:
        given = self.levels(_moved_argument(call), source)
        name = layer_of(var)
        bounds = bounds_of(call)
        if bounds is not None:
            return self.clipped(given, bounds[1], bounds[2], name)
        if call.op == _MAX_POOL2D:
            attrs = call.attrs
            data = self._layouts.as_layout(given, Layout.NHWC)
            pooled = relax.op.nn.max_pool2d(
                data,
                attrs.pool_size,
                strides=attrs.strides,
                padding=attrs.padding,
                dilation=attrs.dilation,
                ceil_mode=attrs.ceil_mode,
                layout="NHWC",
            )
            new = self._rebuilder.emit(pooled, name)
            return LevelTensor(var=new, layout=Layout.NHWC, levels=given.levels)
        if call.op == _RESIZE:
            data = self._layouts.as_layout(given, Layout.NHWC)
            new = self._rebuilder.emit(_resized(data, call), name)
            return LevelTensor(var=new, layout=Layout.NHWC, levels=given.levels)
        data = self._layouts.as_layout(given, Layout.MODEL)
        if call.op == _PAD:
            zero_point = float(given.levels.zero_point)
            padded = relax.op.nn.pad(data, call.attrs.pad_width, pad_value=zero_point)
            new = self._rebuilder.emit(padded, name)
            return LevelTensor(var=new, layout=Layout.MODEL, levels=given.levels)
        new = self._rebuilder.emit(with_args(call, [data, *call.args[1:]]), name)
        return LevelTensor(var=new, layout=Layout.MODEL, levels=given.levels)

    def clipped(self, given: LevelTensor, low: float, high: float, name: str) -> LevelTensor:
        """Return levels clipped to real bounds; bounds at the ends of the range clip nothing."""
        _, least, most = given.levels.bounds(low, high)
        var = given.var
        if least > 0:
            var = self._rebuilder.emit(relax.op.maximum(var, relax.const(least, "uint8")), name)
        if most < 255:
            var = self._rebuilder.emit(relax.op.minimum(var, relax.const(most, "uint8")), name)
        return LevelTensor(var=var, layout=given.layout, levels=given.levels)


def _moved_argument(call: relax.Call) -> relax.Expr:
    bounds = bounds_of(call)
    return call.args[0] if bounds is None else bounds[0]


def picks_elements(call: relax.Call) -> bool:
    """Tell whether a resizing gives nothing but elements of its input; a crop may fill in more."""
    crop = str(call.attrs.coordinate_transformation_mode) == "tf_crop_and_resize"
    return str(call.attrs.method) == "nearest_neighbor" and not crop


def _resized(data: relax.Expr, call: relax.Call) -> relax.Expr:
    """Return what a resizing to the nearest gives, over NHWC."""
    attrs = call.attrs
    return relax.op.image.resize2d(
        data,
        call.args[1],
        layout="NHWC",
        method=attrs.method,
        coordinate_transformation_mode=attrs.coordinate_transformation_mode,
        rounding_method=attrs.rounding_method,
    )


def _keeps_levels(call: relax.Call) -> bool:
    bounds = bounds_of(call)
    if bounds is not None:
        # Another bound than 0 may lie between two levels.
        return all(x == 0 or math.isinf(x) for x in bounds[1:])
    if call.op == _MAX_POOL2D:
        return str(call.attrs.layout) == "NCHW" and len(shape_of(call)) == 4
    if call.op == _RESIZE:
        return str(call.attrs.layout) == "NCHW" and picks_elements(call)
    if call.op == _PAD:
        return str(call.attrs.pad_mode) == "constant" and float(call.attrs.pad_value) == 0
    return call.op in _MOVES


_PAD = Op.get("relax.nn.pad")
_RESIZE = Op.get("relax.image.resize2d")
_MAX_POOL2D = Op.get("relax.nn.max_pool2d")
_MOVES = tuple(
    Op.get(f"relax.{name}")
    for name in (
        *("reshape", "permute_dims", "flatten", "squeeze", "expand_dims", "strided_slice"),
        *("broadcast_to", "tile"),
    )
)
