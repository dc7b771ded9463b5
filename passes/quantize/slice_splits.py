"""Writes splits as slices, which move levels as they are.

Rewrites each field of ``relax.split`` as a ``relax.strided_slice``. Runs before `match_qdq` and
`quantize_int8`; a module without splits stays the same. Numerics: exact.
"""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import GenericConst, Op

from hone.passes.graph.dataflow import Dataflow, Rebuilder, is_dataflow, shape_of


@relax.transform.function_pass(opt_level=0)
class SliceSplits:
    """Write splits as slices."""

    def transform_function(
        self, function: relax.Function, _module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> relax.Function:
        """Return the function without splits, or the very same function."""
        if not is_dataflow(function):
            return function
        graph = Dataflow(function)
        if not any(_split(graph, binding.value) is not None for binding in graph.bindings):
            return function
        builder = Rebuilder(function)
        for binding in graph.bindings:
            split = _split(graph, binding.value)
            if split is None:
                builder.copy(binding)
                continue
            axis, starts = split
            data = builder.use(graph.definition[binding.value.tuple_value].args[0])
            index = binding.value.index
            builder.bind(
                binding.var,
                relax.op.strided_slice(
                    data, axes=[axis], begin=[starts[index]], end=[starts[index + 1]]
                ),
            )
        return builder.finish()


def _split(graph: Dataflow, value: relax.Expr) -> tuple[int, list[int]] | None:
    """Return the axis and the borders of the split that a value is a field of, if it is one."""
    if not isinstance(value, relax.TupleGetItem):
        return None
    call = graph.call(value.tuple_value, _SPLIT)
    if call is None or isinstance(call.args[0], GenericConst):
        return None
    fields = [tuple(int(extent) for extent in field.shape) for field in call.ty.fields]
    axis = int(call.attrs.axis) % len(shape_of(call.args[0]))
    starts = [0]
    for shape in fields:
        starts.append(starts[-1] + shape[axis])
    return axis, starts


_SPLIT = Op.get("relax.split")
