"""Computes convolutions and matrix products from 16-bit floats, with sums in float32.

Rewrites ``relax.nn.conv2d`` and ``relax.matmul`` in float32: operands become bfloat16 or float16,
weights are rounded here, the result stays float32. A tensor that such a layer reads is stored in
16 bits, and whatever else reads it widens it again; layout changes and the like move the 16-bit
values. Runs on NHWC with batch norm folded, before lowering; the function's inputs and outputs keep
their types. Numerics: each operand is rounded to nearest even, relative error 2**-9 (bfloat16) or
2**-12 (float16, within ±65504); nothing else is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from hone.errors import UsageError
from hone.targets.half_dot import BFLOAT16, DTYPES, FLOAT16

from .dataflow import (
    Dataflow,
    Rebuilder,
    is_dataflow,
    layer_of,
    shape_of,
    variables,
    with_args,
)

HALF = "@half"
"""Ends the name of a binding that holds a layer's result in 16 bits."""

LARGE_TILES = "hone.large_tiles"
"""Attribute of a function whose layers in bfloat16 may take F(4x4), see `hone.passes.lower`."""

_CONV2D = tvm.ir.Op.get("relax.nn.conv2d")
_MATMUL = tvm.ir.Op.get("relax.matmul")
_MAX_POOL2D = tvm.ir.Op.get("relax.nn.max_pool2d")
# What only moves values.
_MOVES = tuple(
    tvm.ir.Op.get(f"relax.{name}")
    for name in ("reshape", "permute_dims", "expand_dims", "squeeze", "strided_slice", "concat")
)
_NUMPY = {BFLOAT16: ml_dtypes.bfloat16, FLOAT16: np.float16}


@dataclass(frozen=True, kw_only=True)
class HalfPlan:
    """What `ToHalf` does to a function.

    Parameters
    ----------
    converted : tuple of str
        Layers whose products are of 16-bit floats.
    skipped : tuple of (str, str)
        Convolutions and matrix products that stay as they are, each with the reason.
    """

    converted: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


@relax.transform.function_pass(opt_level=0)
class ToHalf:
    """Compute products from 16-bit floats.

    Parameters
    ----------
    dtype : str
        ``bfloat16`` or ``float16``.
    keep_float : sequence of str
        Bindings of layers that stay in float32.
    large_tiles : bool
        Note on the function that Winograd may take F(4x4) where its products are of bfloat16.

    Raises
    ------
    UsageError
        The type is none of the two.
    """

    def __init__(
        self,
        *,
        dtype: str = BFLOAT16,
        keep_float: Sequence[str] = (),
        large_tiles: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        self._dtype = dtype
        self._keep_float = frozenset(keep_float)
        self._large_tiles = large_tiles

    def plan(self, module: tvm.IRModule) -> HalfPlan:
        """Return what the pass would do to ``main`` of a module."""
        graph = Dataflow(module["main"])
        chosen, skipped = self._choose(graph)
        return HalfPlan(
            converted=tuple(layer_of(b.var) for b in graph.bindings if b.var in chosen),
            skipped=tuple((layer_of(var), reason) for var, reason in skipped.items()),
        )

    def transform_function(
        self, function: relax.Function, _module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> relax.Function:
        """Return the function with its layers converted, or the very same function."""
        if not is_dataflow(function):
            return function
        graph = Dataflow(function)
        chosen, _ = self._choose(graph)
        if not chosen:
            return function
        written = _Writer(graph, chosen, self._keep_float, self._dtype).write()
        return written.with_attr(LARGE_TILES, True) if self._large_tiles else written

    def _choose(self, graph: Dataflow) -> tuple[set[relax.Var], dict[relax.Var, str]]:
        chosen: set[relax.Var] = set()
        skipped: dict[relax.Var, str] = {}
        for binding in graph.bindings:
            call = graph.call(binding.var)
            if call is None or not (call.op.same_as(_CONV2D) or call.op.same_as(_MATMUL)):
                continue
            reason = _obstacle(graph, call)
            if layer_of(binding.var) in self._keep_float:
                reason = "kept in float by the recipe"
            if reason:
                skipped[binding.var] = reason
            else:
                chosen.add(binding.var)
        return chosen, skipped

    def __repr__(self) -> str:
        return f"ToHalf({self._dtype})"


def _obstacle(graph: Dataflow, call: relax.Call) -> str | None:
    """Return why a layer stays in float32, or None."""
    data, weight = call.args
    if not (str(data.ty.dtype) == str(weight.ty.dtype) == str(call.ty.dtype) == "float32"):
        return "is not in float32"
    if call.op.same_as(_CONV2D):
        attrs = call.attrs
        if (str(attrs.data_layout), str(attrs.kernel_layout)) != ("NHWC", "OHWI"):
            return f"its layout is {attrs.data_layout}/{attrs.kernel_layout}, not NHWC/OHWI"
        if int(attrs.groups) != 1:
            return "is grouped: it reads 16-bit floats and computes in float32"
        if graph.constant(weight) is None:
            return "its weights are computed"
        return None
    left, right = shape_of(data), shape_of(weight)
    if graph.constant(weight) is not None and len(right) == 2 and len(left) >= 2:
        return None
    if len(left) == len(right) >= 3 and left[:-2] == right[:-2]:
        return None
    return "its operands are not two batches of matrices"


class _Writer:
    """Writes the converted function."""

    def __init__(
        self, graph: Dataflow, chosen: set[relax.Var], keep_float: frozenset[str], dtype: str
    ) -> None:
        self._graph = graph
        self._keep_float = keep_float
        self._chosen = chosen
        self._dtype = dtype
        self._builder = Rebuilder(graph.function)
        # Original variable -> the 16-bit tensor, and the float32 one where that was computed.
        self._halves: dict[relax.Var, relax.Var] = {}
        self._singles: dict[relax.Var, relax.Var] = {}
        self._stored = self._find_stored()

    def _find_stored(self) -> set[relax.Var]:
        """Return the variables that are stored in 16 bits."""
        stored: set[relax.Var] = set()
        for binding in reversed(self._graph.bindings):
            call = self._graph.call(binding.var)
            if call is None:
                continue
            moves = _is_move(call) or call.op.same_as(_MAX_POOL2D)
            if binding.var in self._chosen or self._reads_halves(binding):
                stored.update(v for v in call.args if isinstance(v, relax.Var))
            elif binding.var in stored and moves:
                # Rounding keeps the order, so that the largest may be found after it.
                stored.update(v for v in _operands(call) if isinstance(v, relax.Var))
        return {var for var in stored if self._graph.constant(var) is None}

    def _reads_halves(self, binding: relax.VarBinding) -> bool:
        """Say whether a layer computes in float32, but from data stored in 16 bits.

        A depthwise convolution takes longer to read its data than to sum it.
        """
        call = binding.value
        grouped = call.op.same_as(_CONV2D) and int(call.attrs.groups) > 1
        return grouped and layer_of(binding.var) not in self._keep_float

    def write(self) -> relax.Function:
        """Return the function with its layers converted."""
        for parameter in self._graph.function.params:
            self._store(parameter, parameter)
        for binding in self._graph.bindings:
            if binding.var in self._chosen:
                self._layer(binding)
            elif binding.var in self._stored and self._moves_halves(binding):
                self._move(binding)
            else:
                self._widen_operands(binding)
                self._store(binding.var, self._builder.copy(binding))
        for output in self._graph.outputs:
            if isinstance(output, relax.Var) and output in self._halves:
                self._builder.replace(output, self._float(output))
        return self._builder.finish()

    def _store(self, original: relax.Var, single: relax.Var) -> None:
        """Round a new tensor once, where it is one of those stored in 16 bits."""
        if original not in self._stored:
            return
        self._singles[original] = single
        name = f"{layer_of(original)}{HALF}"
        self._halves[original] = self._builder.emit(relax.op.astype(single, self._dtype), name)

    def _half(self, expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Var) and expr in self._halves:
            return self._halves[expr]
        value = self._graph.constant(expr)
        if value is None:
            raise RuntimeError(f"{expr} is read by a converted layer, but was not stored")
        return constant(value, self._dtype)

    def _float(self, var: relax.Var) -> relax.Var:
        """Return a float32 tensor, as it was before rounding if it was ever computed."""
        if var not in self._singles:
            widened = relax.op.astype(self._halves[var], "float32")
            output = not isinstance(var, relax.DataflowVar)
            self._singles[var] = self._builder.emit(widened, str(var.name), output=output)
        return self._singles[var]

    def _layer(self, binding: relax.VarBinding) -> None:
        call = binding.value
        operands = [self._half(argument) for argument in call.args]
        attrs = call.attrs
        if call.op.same_as(_CONV2D):
            value = relax.op.nn.conv2d(
                *operands,
                strides=[int(x) for x in attrs.strides],
                padding=[int(x) for x in attrs.padding],
                dilation=[int(x) for x in attrs.dilation],
                data_layout=attrs.data_layout,
                kernel_layout=attrs.kernel_layout,
                out_layout=attrs.out_layout,
                out_dtype="float32",
            )
        else:
            value = relax.op.matmul(*operands, out_dtype="float32")
        self._store(binding.var, self._builder.bind(binding.var, value))

    def _moves_halves(self, binding: relax.VarBinding) -> bool:
        call = self._graph.call(binding.var)
        return call is not None and _is_move(call)

    def _move(self, binding: relax.VarBinding) -> None:
        """Move 16-bit values; the float32 tensor comes to be only if something asks for it."""
        call = binding.value
        source = call.args[0]
        if isinstance(source, relax.Tuple):
            source = relax.Tuple([self._half(field) for field in source.fields])
        else:
            source = self._half(source)
        moved = with_args(call, [source, *call.args[1:]])
        name = f"{layer_of(binding.var)}{HALF}"
        self._halves[binding.var] = self._builder.emit(moved, name)

    def _widen_operands(self, binding: relax.VarBinding) -> None:
        """Let the binding read its 16-bit operands widened, each by a cast of its own.

        A cast that two kernels shared would be a kernel itself, and its result in memory.
        """
        for var in dict.fromkeys(variables(binding.value)):
            if var not in self._halves:
                continue
            if isinstance(binding.value, relax.Tuple):  # results of the function
                self._builder.replace(var, self._float(var))
            else:
                widened = relax.op.astype(self._halves[var], "float32")
                self._builder.replace(var, self._builder.emit(widened, f"{layer_of(var)}@float"))


def constant(value: np.ndarray, dtype: str) -> GenericConst:
    """Return a float32 array rounded to a 16-bit float, ties to even.

    1.00390625 (1 + 2**-8) lies between the bfloat16 numbers 1 and 1.0078125 and becomes 1, whose
    last bit is 0.
    """
    return relax.const(tvm.runtime.tensor(value.astype(_NUMPY[dtype])))


def _is_move(call: relax.Call) -> bool:
    return any(call.op.same_as(op) for op in _MOVES)


def _operands(call: relax.Call) -> list[relax.Expr]:
    source = call.args[0]
    return list(source.fields) if isinstance(source, relax.Tuple) else [source]
