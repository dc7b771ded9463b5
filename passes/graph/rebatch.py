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
    is multiplied by ``batch / old batch``. Constants with an entry for each sample lose those of
    samples that are gone, and have to be the same for all.

    Parameters
    ----------
    batch : int
        The new leading dimension: a multiple of the present one, or one of its divisors.

    Raises
    ------
    UsageError
        The batch is less than 1.
    ModelError
        The inputs do not share a leading dimension that divides `batch` or is a multiple of it, or
        a layer mixes samples or loses track of them; names the layer.
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
        before = self._before(function)
        if before == self._batch:
            return module
        functions = dict(module.functions_items())
        functions[module.get_global_var("main")] = _rewrite(function, before, self._batch)
        return tvm.IRModule(functions, attrs=module.attrs)

    def _before(self, function: relax.Function) -> int:
        shapes = {str(param.name): shape_of(param) for param in function.params}
        leading = {shape[:1] for shape in shapes.values()}
        (before,) = next(iter(leading), ()) or (0,)
        if len(leading) != 1 or not before or (self._batch % before and before % self._batch):
            given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise ModelError(
                "inputs with one leading dimension that is a divisor or a multiple of "
                f"{self._batch} are required, given are {given}"
            )
        return int(before)


def _rewrite(function: relax.Function, before: int, batch: int) -> relax.Function:
    graph = Dataflow(function)
    params = [_rebatched(param, batch) for param in function.params]
    builder = Rebuilder(function, params)
    for old, new in zip(function.params, params, strict=True):
        builder.replace(old, new)
    rules = BatchRules(graph, builder, batch=before, new_batch=batch)
    for binding in graph.bindings:
        var, value = binding.var, binding.value
        if isinstance(value, relax.Call):
            new = builder.bind(var, rules.call(var, value)) if rules.reads(value) else None
        else:
            new = builder.copy(binding)
            rules.follow(var, value)
        if new is None:
            builder.copy(binding)
        elif _shapes(new.ty) != _expected(rules, var):
            raise ModelError(
                f"the batch cannot be followed: {var.ty} became {new.ty}", where=layer_of(var)
            )
    for output in graph.outputs:
        if rules.axis(output) is None:
            raise ModelError("an output does not depend on the batch of the inputs")
    return builder.finish()


def _expected(rules: BatchRules, var: relax.Var) -> list[list[int]]:
    shapes = _shapes(var.ty)
    for shape, axis in zip(shapes, rules.axes(var), strict=True):
        if axis is not None:
            shape[axis] = rules.scaled(shape[axis])
    return shapes


def _shapes(ty: tvm.ir.Type) -> list[list[int]]:
    fields = [ty] if isinstance(ty, relax.TensorType) else ty.fields
    return [[int(extent) for extent in field.shape] for field in fields]


def _rebatched(param: relax.Var, batch: int) -> relax.Var:
    return relax.Var(param.name, relax.TensorType([batch, *shape_of(param)[1:]], param.ty.dtype))
