"""Rewrites a module for another batch size.

Rewrites the type of every input, the target shapes of reshapes and broadcasts, and constants that
have one entry per sample. Runs on high-level operators; nothing has to run before or after.
Numerics: exact, each sample of the batch gives what it gave alone.
"""

from __future__ import annotations

import tvm
from tvm import relax

from hone.errors import ModelError, UsageError

from .batch_rules import BatchRules
from .dataflow import Dataflow, Rebuilder, layer_of, shape_of


@tvm.transform.module_pass(opt_level=0)
class Rebatch:
    """Give every input of ``main`` the leading dimension `batch`.

    The batch is followed from the inputs through every operator: wherever it stands, the extent
    is multiplied by ``batch / old batch``.

    Parameters
    ----------
    batch : int
        The new leading dimension, a multiple of the present one.

    Raises
    ------
    UsageError
        The batch is less than 1.
    ModelError
        The inputs do not share a leading dimension that divides `batch`, or a layer mixes samples
        or loses track of them; names the layer.
    """

    def __init__(self, batch: int) -> None:
        if batch < 1:
            raise UsageError(f"the batch must be at least 1, not {batch}")
        self._batch = batch

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with the new batch, or the very same one."""
        function = module["main"]
        factor = self._factor(function)
        if factor == 1:
            return module
        functions = dict(module.functions_items())
        functions[module.get_global_var("main")] = _rewrite(function, factor)
        return tvm.IRModule(functions, attrs=module.attrs)

    def _factor(self, function: relax.Function) -> int:
        shapes = {str(param.name): shape_of(param) for param in function.params}
        leading = {shape[:1] for shape in shapes.values()}
        if len(leading) != 1 or () in leading or self._batch % next(iter(leading))[0]:
            given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise ModelError(
                f"inputs with one leading dimension that divides {self._batch} are required, "
                f"given are {given}"
            )
        return self._batch // int(next(iter(leading))[0])


def _rewrite(function: relax.Function, factor: int) -> relax.Function:
    graph = Dataflow(function)
    params = [_scaled(param, factor) for param in function.params]
    builder = Rebuilder(function, params)
    for old, new in zip(function.params, params, strict=True):
        builder.replace(old, new)
    batch = shape_of(function.params[0])[0]
    rules = BatchRules(graph, builder, batch=batch, factor=factor)
    for binding in graph.bindings:
        var, value = binding.var, binding.value
        if isinstance(value, relax.Call):
            new = builder.bind(var, rules.call(var, value)) if rules.reads(value) else None
        else:
            new = builder.copy(binding)
            rules.follow(var, value)
        if new is None:
            builder.copy(binding)
        elif _shapes(new.ty) != _expected(rules, var, factor):
            raise ModelError(
                f"the batch cannot be followed: {var.ty} became {new.ty}", where=layer_of(var)
            )
    for output in graph.outputs:
        if rules.axis(output) is None:
            raise ModelError("an output does not depend on the batch of the inputs")
    return builder.finish()


def _expected(rules: BatchRules, var: relax.Var, factor: int) -> list[list[int]]:
    shapes = _shapes(var.ty)
    for shape, axis in zip(shapes, rules.axes(var), strict=True):
        if axis is not None:
            shape[axis] *= factor
    return shapes


def _shapes(ty: tvm.ir.Type) -> list[list[int]]:
    fields = [ty] if isinstance(ty, relax.TensorType) else ty.fields
    return [[int(extent) for extent in field.shape] for field in fields]


def _scaled(param: relax.Var, factor: int) -> relax.Var:
    shape = list(shape_of(param))
    shape[0] *= factor
    return relax.Var(param.name, relax.TensorType(shape, param.ty.dtype))
