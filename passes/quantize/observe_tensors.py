"""Makes a network return the extremes of its tensors, instead of its own result.

Rewrites ``main`` of one dataflow block. The reductions are part of the compiled graph, so that
what leaves it is small however large the tensors are. Runs on the module that is quantized later,
before lowering. Numerics: exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import relax

from hone.passes.graph.dataflow import Dataflow, shape_of, variables

STATISTICS = 3
"""Results for each tensor: minimum, maximum, and 1.0 where everything is finite, else 0.0."""


@tvm.transform.module_pass(opt_level=0)
class ObserveTensors:
    """Return ``(minimum, maximum, finite)`` of each tensor, reduced over all axes but the last.

    Each is ``[C]``, one number for each index of the last axis (a channel in NHWC); together they
    are one flat tuple in the order of the names. A comparison drops NaN, so the extremes mean
    nothing where ``finite`` is 0.

    Parameters
    ----------
    tensors : sequence of str
        Names of float32 bindings or parameters of ``main``.
    """

    def __init__(self, *, tensors: Sequence[str]) -> None:
        self._tensors = tuple(tensors)

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the observing module.

        Raises
        ------
        ModelError
            A name is no tensor of the function.
        """
        function = module["main"]
        graph = Dataflow(function)
        observed = graph.tensors(self._tensors)
        builder = relax.BlockBuilder()
        reductions: list[relax.VarBinding] = []

        def emit(value: relax.Expr, name: str, *, output: bool = False) -> relax.Var:
            value = builder.normalize(value)
            var = (relax.Var if output else relax.DataflowVar)(name, value.ty)
            reductions.append(relax.VarBinding(var, value))
            return var

        results: list[relax.Var] = []
        for name, tensor in zip(self._tensors, observed, strict=True):
            var = tensor
            if not shape_of(var):
                var = emit(relax.op.reshape(var, (1, 1)), f"{name}@scalar")
            elif len(shape_of(var)) == 1:
                var = emit(relax.op.expand_dims(var, [0]), f"{name}@row")
            axes = list(range(len(shape_of(var)) - 1))
            finite = emit(relax.op.isfinite(var), f"{name}@isfinite")
            finite = emit(relax.op.astype(finite, "float32"), f"{name}@astype")
            results += [
                emit(relax.op.min(var, axes), f"{name}@min", output=True),
                emit(relax.op.max(var, axes), f"{name}@max", output=True),
                emit(relax.op.min(finite, axes), f"{name}@finite", output=True),
            ]
        body = builder.normalize(relax.Tuple(results))
        block = relax.DataflowBlock(_live([*graph.bindings, *reductions], results))
        observing = relax.Function(
            function.params,
            relax.SeqExpr([block], body),
            body.ty,
            function.is_pure,
            function.attrs,
        )
        return tvm.IRModule({"main": observing}, attrs=module.attrs)


def _live(
    bindings: Sequence[relax.VarBinding], results: Sequence[relax.Var]
) -> list[relax.VarBinding]:
    """Return the bindings that the results need, in order."""
    needed = set(results)
    kept = []
    for binding in reversed(bindings):
        if binding.var in needed:
            needed.update(variables(binding.value))
            kept.append(binding)
    kept.reverse()
    return kept
