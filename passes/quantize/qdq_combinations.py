"""Writes what combines level tensors in a QDQ module, and what is a function of one.

Additions, products, concatenations, means, average pooling and tables; each becomes an integer
operator where all of its operands are levels. Numerics: see `hone.passes.quantize.match_qdq`.
"""

from __future__ import annotations

import math

import numpy as np
from tvm import relax
from tvm.ir import Op

from hone.passes.graph.dataflow import PART, Dataflow, Rebuilder, layer_of, shape_of

from . import operators
from .arithmetic import FIXED_LIMIT, GUARD_BITS
from .integer_layer import INT32_MAX, rescaling
from .integer_writer import rescale
from .level_layouts import Layout, LevelLayouts, LevelTensor
from .level_moves import LevelMoves, Source
from .level_tables import LevelFunction, level_function, table_of
from .levels import Levels
from .quantize_int8 import QuantizedLayer
from .site import Kind

_NHWC_AXIS = (0, 3, 1, 2)
"""Where an axis of NCHW is in NHWC."""


class LevelCombinations:
    """Writes integer operators for what a quantization reads.

    Parameters
    ----------
    graph : Dataflow
        The original function.
    rebuilder : Rebuilder
        Where operators are written.
    layouts : LevelLayouts
        Of the level tensors.
    moves : LevelMoves
        Finds the levels of operands.
    source : callable
        As for `LevelMoves.levels`.

    Attributes
    ----------
    quantized : list of QuantizedLayer
        What became integer operators.
    """

    def __init__(
        self,
        graph: Dataflow,
        rebuilder: Rebuilder,
        layouts: LevelLayouts,
        moves: LevelMoves,
        source: Source,
    ) -> None:
        self._graph = graph
        self._rebuilder = rebuilder
        self._layouts = layouts
        self._moves = moves
        self._source = source
        self.quantized: list[QuantizedLayer] = []

    def _levels(self, expr: relax.Expr) -> LevelTensor:
        return self._moves.levels(expr, self._source)

    def requantized(
        self, given: LevelTensor, output: Levels, low: float, high: float, name: str
    ) -> LevelTensor:
        """Return levels of another scale.

        Parameters
        ----------
        given : LevelTensor
            Levels.
        output : Levels
            What the result means.
        low, high : float
            Real bounds of an activation before it.
        name : str
            Of the bindings.
        """
        if given.levels == output:
            return self._moves.clipped(given, low, high, name)
        constants = rescaling(given.levels, output, (low, high))
        new = rescale(self._rebuilder.emit, given.var, constants, f"{name}{PART}rescale")
        return LevelTensor(var=new, layout=given.layout, levels=output)

    def combined(
        self, var: relax.Var, call: relax.Call, output: Levels, low: float, high: float
    ) -> LevelTensor | None:
        """Return what a binding computes from levels, quantized; None where it is no such thing.

        Parameters
        ----------
        var, call : relax.Var and relax.Call
            The binding.
        output : Levels
            Of its quantization.
        low, high : float
            Real bounds of an activation between them.
        """
        if call.op == _CONCAT:
            return self._concatenated(var, call, output, low, high)
        function = level_function(self._graph, var, self._moves.is_moved)
        if function is not None and self._moves.has_levels(function.source):
            return self._looked_up(var, function, output, low, high)
        if call.op == _ADD and shape_of(call.args[0]) == shape_of(call.args[1]):
            return self._sum(var, call, output, low, high)
        if call.op == _MULTIPLY:
            return self._product(var, call, output, low, high)
        if call.op not in (_MEAN, _AVG_POOL2D) or not self._moves.has_levels(call.args[0]):
            return None
        given = self._levels(call.args[0])
        if call.op == _MEAN:
            new, layout, kind = *self._mean(call, given, output, low, high), Kind.MEAN
        elif not _averages_whole_windows(call):
            return None
        else:
            new, layout, kind = *self._average(call, given, output, low, high), Kind.AVG_POOL2D
        if new is None:
            return None
        result = self._rebuilder.emit(new, layer_of(var))
        self._note(var, kind)
        return LevelTensor(var=result, layout=layout, levels=output)

    def _sum(
        self, var: relax.Var, call: relax.Call, output: Levels, low: float, high: float
    ) -> LevelTensor | None:
        if not all(self._moves.has_levels(x) for x in call.args):
            return None
        left, right = (self._levels(x) for x in call.args)
        scales = np.array([left.levels.scale, right.levels.scale])
        fixed = scales / output.scale * (1 << GUARD_BITS)
        if fixed.max() * 255 >= FIXED_LIMIT:
            return None
        layout = Layout.NHWC if Layout.NHWC in (left.layout, right.layout) else Layout.MODEL
        points = [left.levels.zero_point, right.levels.zero_point]
        new = self._rebuilder.emit(
            operators.add_int8(
                self._layouts.as_layout(left, layout),
                self._layouts.as_layout(right, layout),
                relax.const(fixed.astype(np.float32)),
                relax.const(np.array([*points, *output.bounds(low, high)], np.int32)),
            ),
            layer_of(var),
        )
        self._note(var, Kind.ADD)
        return LevelTensor(var=new, layout=layout, levels=output)

    def _looked_up(
        self, var: relax.Var, function: LevelFunction, output: Levels, low: float, high: float
    ) -> LevelTensor:
        given = self._levels(function.source)
        table = table_of(function.apply, given.levels, output, (low, high))
        new = self._rebuilder.emit(
            operators.table_int8(given.var, relax.const(table)), layer_of(var)
        )
        layers = tuple(dict.fromkeys(layer_of(each) for each in function.inner))
        self._note(var, Kind.TABLE, layers)
        return LevelTensor(var=new, layout=given.layout, levels=output)

    def _product(
        self, var: relax.Var, call: relax.Call, output: Levels, low: float, high: float
    ) -> LevelTensor | None:
        if not all(self._moves.has_levels(x) for x in call.args):
            return None
        if len({len(shape_of(x)) for x in call.args}) > 1:
            return None
        left, right = (self._levels(x) for x in call.args)
        layout = Layout.NHWC if Layout.NHWC in (left.layout, right.layout) else Layout.MODEL
        points = [left.levels.zero_point, right.levels.zero_point]
        new = self._rebuilder.emit(
            operators.multiply_int8(
                self._layouts.as_layout(left, layout),
                self._layouts.as_layout(right, layout),
                _multiplier(left.levels.scale * right.levels.scale / output.scale),
                relax.const(np.array([*points, *output.bounds(low, high)], np.int32)),
            ),
            layer_of(var),
        )
        self._note(var, Kind.MULTIPLY)
        return LevelTensor(var=new, layout=layout, levels=output)

    def _concatenated(
        self, var: relax.Var, call: relax.Call, output: Levels, low: float, high: float
    ) -> LevelTensor | None:
        fields = self._graph.resolve(call.args[0])
        if not isinstance(fields, relax.Tuple):
            return None
        if not all(self._moves.has_levels(x) for x in fields.fields):
            return None
        name = layer_of(var)
        parts = [
            self.requantized(self._levels(x), output, -math.inf, math.inf, name)
            for x in fields.fields
        ]
        rank = len(shape_of(call))
        axis = int(call.attrs.axis) % rank
        layout = Layout.NHWC if all(p.layout is Layout.NHWC for p in parts) else Layout.MODEL
        tensors = [self._layouts.as_layout(p, layout) for p in parts]
        where = _NHWC_AXIS[axis] if layout is Layout.NHWC else axis
        new = self._rebuilder.emit(relax.op.concat(tensors, where), name)
        joined = LevelTensor(var=new, layout=layout, levels=output)
        return self._moves.clipped(joined, low, high, name)

    def _mean(
        self, call: relax.Call, given: LevelTensor, output: Levels, low: float, high: float
    ) -> tuple[relax.Call | None, Layout]:
        shape = shape_of(call.args[0])
        axes = [int(a) % len(shape) for a in call.attrs.axis or range(len(shape))]
        count = math.prod(shape[a] for a in axes)
        if count * 255 > INT32_MAX:
            return None, Layout.MODEL
        layout = Layout.MODEL
        if given.layout is Layout.NHWC and (call.attrs.keepdims or sorted(axes) == [2, 3]):
            # Without the averaged axes nothing is left that the layouts order differently.
            layout = Layout.NHWC if call.attrs.keepdims else Layout.MODEL
            data, axes = given.var, [_NHWC_AXIS[a] for a in axes]
        else:
            data = self._layouts.as_layout(given, Layout.MODEL)
        operator = operators.mean_int8(
            data,
            _multiplier(given.levels.scale / (output.scale * count)),
            _levels_constant(given.levels, output, low, high),
            axis=axes,
            keepdims=call.attrs.keepdims,
        )
        return operator, layout

    def _average(
        self, call: relax.Call, given: LevelTensor, output: Levels, low: float, high: float
    ) -> tuple[relax.Call, Layout]:
        attrs = call.attrs
        count = math.prod(int(x) for x in attrs.pool_size)
        operator = operators.avg_pool2d_int8(
            self._layouts.as_layout(given, Layout.NHWC),
            _multiplier(given.levels.scale / (output.scale * count)),
            _levels_constant(given.levels, output, low, high),
            pool_size=attrs.pool_size,
            strides=attrs.strides,
            padding=attrs.padding,
            dilation=attrs.dilation,
        )
        return operator, Layout.NHWC

    def _note(self, var: relax.Var, kind: Kind, layers: tuple[str, ...] = ()) -> None:
        name = layer_of(var)
        self.quantized.append(
            QuantizedLayer(layer=name, kind=kind, layers=layers or (name,), output="uint8")
        )


def _averages_whole_windows(call: relax.Call) -> bool:
    attrs = call.attrs
    uniform = bool(attrs.count_include_pad) or not any(int(p) for p in attrs.padding)
    count = math.prod(int(x) for x in attrs.pool_size)
    return (
        str(attrs.layout) == "NCHW" and uniform and not attrs.ceil_mode and count * 255 <= INT32_MAX
    )


def _multiplier(value: float) -> relax.Expr:
    return relax.const(np.array([value], np.float32))


def _levels_constant(given: Levels, output: Levels, low: float, high: float) -> relax.Expr:
    return relax.const(np.array([given.zero_point, *output.bounds(low, high)], np.int32))


_ADD = Op.get("relax.add")
_CONCAT = Op.get("relax.concat")
_MULTIPLY = Op.get("relax.multiply")
_MEAN = Op.get("relax.mean")
_AVG_POOL2D = Op.get("relax.nn.avg_pool2d")
