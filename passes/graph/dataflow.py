"""Reads a Relax function of one dataflow block, and rebuilds it binding by binding.

What the graph passes share: definitions, uses, constants, and a builder that keeps the names of
the binding variables exactly (upstream's block builder replaces dots and slashes, and a layer's
id is its variable's name). Numerics: exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from hone.errors import ModelError
from hone.passes import ffi_errors as ffi_errors  # a pass must be able to raise

PART = "@"
"""Stands between a layer's binding name and the operator of a part: ``conv1@conv2d``."""


class Dataflow:
    """A function of one dataflow block: who defines what, and who uses it.

    Parameters
    ----------
    function : relax.Function
        One dataflow block and a body that is a variable or a tuple of variables.

    Raises
    ------
    ModelError
        The function has another form.
    """

    def __init__(self, function: relax.Function) -> None:
        if not is_dataflow(function):
            raise ModelError(
                "a function of exactly one dataflow block is required",
                hint="the module must come from hone's importer",
            )
        self.function = function
        self.bindings: tuple[relax.VarBinding, ...] = tuple(function.body.blocks[0].bindings)
        self.definition = {binding.var: binding.value for binding in self.bindings}
        self.users: dict[relax.Var, list[relax.Var | None]] = {}
        for binding in self.bindings:
            for var in variables(binding.value):
                self.users.setdefault(var, []).append(binding.var)
        for var in variables(function.body.body):
            self.users.setdefault(var, []).append(None)

    @property
    def outputs(self) -> tuple[relax.Expr, ...]:
        """The expressions returned, with a returned tuple taken apart."""
        body = self.resolve(self.function.body.body)
        return tuple(body.fields) if isinstance(body, relax.Tuple) else (body,)

    def resolve(self, expr: relax.Expr) -> relax.Expr:
        """Return what a variable is bound to, through plain renames."""
        while isinstance(expr, relax.Var) and expr in self.definition:
            value = self.definition[expr]
            if not isinstance(value, relax.Var | GenericConst | relax.Tuple):
                break
            expr = value
        return expr

    def call(self, expr: relax.Expr, op: tvm.ir.Op | None = None) -> relax.Call | None:
        """Return the call (of `op`, where given) that defines `expr`, else None."""
        if isinstance(expr, relax.Var):
            expr = self.definition.get(expr)
        if not isinstance(expr, relax.Call) or (op is not None and not expr.op.same_as(op)):
            return None
        return expr

    def constant(self, expr: relax.Expr) -> np.ndarray | None:
        """Return the value of `expr` where it is a constant, else None.

        Looks through reshape and permute_dims, which importers leave around weights.
        """
        expr = self.resolve(expr)
        if isinstance(expr, GenericConst):
            return np.asarray(expr.value.numpy())
        call = self.call(expr)
        if call is None or not (call.op.same_as(_PERMUTE) or call.op.same_as(_RESHAPE)):
            return None
        value = self.constant(call.args[0])
        if value is None:
            return None
        if call.op.same_as(_RESHAPE):
            return value.reshape(shape_of(call))
        axes = call.attrs.axes
        return value.transpose(None if axes is None else [int(axis) for axis in axes])

    def tensors(self, names: Sequence[str]) -> list[relax.Var]:
        """Return the parameters and bindings of these names, in their order.

        Raises
        ------
        ModelError
            A name is no tensor of the function.
        """
        by_name = {str(var.name): var for var in (*self.function.params, *self.definition)}
        unknown = [name for name in names if name not in by_name]
        if unknown:
            raise ModelError("there is no tensor of these names", problems=unknown)
        return [by_name[name] for name in names]

    def used_once(self, var: relax.Var) -> bool:
        """Tell whether `var` has exactly one use, which is not the function's result."""
        users = self.users.get(var, [])
        return len(users) == 1 and users[0] is not None


class Rebuilder:
    """Writes a changed copy of a dataflow function.

    Parameters
    ----------
    function : relax.Function
        The original; stays as it is.
    params : sequence of relax.Var, optional
        The parameters of the copy, where they differ. The caller says with `replace` what stands
        for an original parameter that is not among them.
    """

    def __init__(self, function: relax.Function, params: Sequence[relax.Var] | None = None) -> None:
        self._function = function
        self._params = list(function.params if params is None else params)
        self._builder = relax.BlockBuilder()
        self._bindings: list[relax.VarBinding] = []
        self._replacement: dict[relax.Var, relax.Expr] = {}

    def use(self, expr: relax.Expr) -> relax.Expr:
        """Return `expr` with every variable replaced by what stands for it now."""
        if isinstance(expr, relax.Var):
            return self._replacement.get(expr, expr)
        if isinstance(expr, relax.Tuple):
            fields = [self.use(field) for field in expr.fields]
            return expr if _same(fields, expr.fields) else relax.Tuple(fields)
        if isinstance(expr, relax.TupleGetItem):
            source = self.use(expr.tuple_value)
            return (
                expr if source.same_as(expr.tuple_value) else relax.TupleGetItem(source, expr.index)
            )
        if isinstance(expr, relax.Call):
            arguments = [self.use(argument) for argument in expr.args]
            return expr if _same(arguments, expr.args) else with_args(expr, arguments)
        return expr

    def emit(self, value: relax.Expr, name: str, *, output: bool = False) -> relax.Var:
        """Append a binding and return its variable; the type is inferred."""
        value = self._builder.normalize(value)
        make = relax.Var if output else relax.DataflowVar
        var = make(name, value.ty)
        self._bindings.append(relax.VarBinding(var, value))
        return var

    def replace(self, var: relax.Var, by: relax.Expr) -> None:
        """Let `by` stand for the original variable from here on."""
        self._replacement[var] = by

    def bind(self, var: relax.Var, value: relax.Expr, *, name: str | None = None) -> relax.Var:
        """Append the binding that stands for the original `var`, under its name."""
        output = not isinstance(var, relax.DataflowVar)
        new = self.emit(value, var.name if name is None else name, output=output)
        self.replace(var, new)
        return new

    def copy(self, binding: relax.VarBinding) -> relax.Var:
        """Append an original binding with its operands replaced and its type inferred again."""
        value = self.use(binding.value)
        if value.same_as(binding.value):
            self._bindings.append(binding)
            return binding.var
        return self.bind(binding.var, value)

    def finish(self, body: relax.Expr | None = None) -> relax.Function:
        """Return the function, without the bindings that nothing uses.

        Parameters
        ----------
        body : relax.Expr, optional
            What it returns, where that is not what stands for the original's result.
        """
        if body is None:
            body = self.use(self._function.body.body)
        live = set(variables(body))
        kept = []
        for binding in reversed(self._bindings):
            if binding.var in live:
                live.update(variables(binding.value))
                kept.append(binding)
        kept.reverse()
        result = self._builder.normalize(relax.SeqExpr([relax.DataflowBlock(kept)], body))
        return relax.Function(
            self._params, result, result.ty, self._function.is_pure, self._function.attrs
        )


def is_dataflow(function: tvm.ir.BaseFunc) -> bool:
    """Tell whether a function is one dataflow block of plain bindings."""
    if not isinstance(function, relax.Function) or not isinstance(function.body, relax.SeqExpr):
        return False
    blocks = function.body.blocks
    return (
        len(blocks) == 1
        and isinstance(blocks[0], relax.DataflowBlock)
        and all(isinstance(binding, relax.VarBinding) for binding in blocks[0].bindings)
        and isinstance(function.body.body, relax.Var | relax.Tuple)
    )


def layer_of(var: relax.Var) -> str:
    """Return the binding name of the layer that a binding is the result, or a part, of."""
    return str(var.name).partition(PART)[0]


def part_of(layer: str, op: tvm.ir.Op) -> str:
    """Return the name of a binding that computes a part of a layer, such as ``fc@matmul``."""
    return f"{layer}{PART}{str(op.name).rpartition('.')[2]}"


def variables(expr: relax.Expr) -> Iterator[relax.Var]:
    """Yield the variables that a binding's value uses, once for each use."""
    if isinstance(expr, relax.Var):
        yield expr
    elif isinstance(expr, relax.Tuple):
        for field in expr.fields:
            yield from variables(field)
    elif isinstance(expr, relax.TupleGetItem):
        yield from variables(expr.tuple_value)
    elif isinstance(expr, relax.Call):
        for argument in expr.args:
            yield from variables(argument)


def with_args(
    call: relax.Call, arguments: Sequence[relax.Expr], attrs: tvm.ir.Attrs | None = None
) -> relax.Call:
    """Return the call with other arguments (and attributes), its type left to be inferred."""
    attrs = call.attrs if attrs is None else attrs
    return relax.Call(call.op, list(arguments), attrs, call.ty_args, call.span)


def shape_of(expr: relax.Expr) -> tuple[int, ...]:
    """Return the static shape of a tensor expression."""
    return tuple(int(extent) for extent in expr.ty.shape)


def _same(new: Sequence[relax.Expr], old: Sequence[relax.Expr]) -> bool:
    return all(a.same_as(b) for a, b in zip(new, old, strict=True))


_RESHAPE = tvm.ir.Op.get("relax.reshape")
_PERMUTE = tvm.ir.Op.get("relax.permute_dims")
