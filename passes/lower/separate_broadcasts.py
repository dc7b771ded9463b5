"""Keeps a small result out of kernels that would compute it again for each element of a large one.

Grouping joins an elementwise operator with the kernel that computes its operand, also where the
operand is broadcast: the gate of a squeeze-and-excitation block would be evaluated for each pixel.
`SeparateBroadcasts` puts an identity between the two, which nothing is grouped with, and
`RemoveSeparations` takes it away again. Run them before and after ``FuseOps``. Numerics: exact.
"""

from __future__ import annotations

import math

import tvm
from tvm import relax

from hone.passes.graph.dataflow import Rebuilder, is_dataflow, shape_of

# TVM's OpPatternKind, as AnnotateTIROpPattern writes it: elementwise (0), which an operator is with
# one operand of its own shape and another that is repeated, and broadcast.
_BROADCAST = 1
_CALL_TIR = tvm.ir.Op.get("relax.call_tir")
_IDENTITY = tvm.ir.Op.get("relax.builtin.stop_lift_params")


@tvm.transform.module_pass(opt_level=0)
class SeparateBroadcasts:
    """Put an identity behind each computed operand that a broadcasting operator repeats."""

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with identities in `main`."""
        function = module["main"]
        if not is_dataflow(function):
            return module
        parameters = set(function.params)
        rebuilder = Rebuilder(function)
        changed = False
        for binding in function.body.blocks[0].bindings:
            value = binding.value
            repeated = [
                argument
                for argument in _operands(module, value)
                if isinstance(argument, relax.Var)
                and argument not in parameters
                and _repeats(argument, binding.var)
            ]
            if not repeated:
                rebuilder.copy(binding)
                continue
            changed = True
            operands = [
                rebuilder.emit(relax.Call(_IDENTITY, [rebuilder.use(a)]), f"{a.name}@once")
                if any(a.same_as(r) for r in repeated)
                else rebuilder.use(a)
                for a in value.args[1].fields
            ]
            call = relax.Call(
                value.op, [value.args[0], relax.Tuple(operands)], value.attrs, value.ty_args
            )
            rebuilder.bind(binding.var, call)
        return _with_main(module, rebuilder.finish()) if changed else module


@tvm.transform.module_pass(opt_level=0)
class RemoveSeparations:
    """Let the operand stand for its identity again."""

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module without identities in `main`."""
        function = module["main"]
        if not is_dataflow(function):
            return module
        rebuilder = Rebuilder(function)
        changed = False
        for binding in function.body.blocks[0].bindings:
            value = binding.value
            if isinstance(value, relax.Call) and value.op.same_as(_IDENTITY):
                rebuilder.replace(binding.var, rebuilder.use(value.args[0]))
                changed = True
            else:
                rebuilder.copy(binding)
        return _with_main(module, rebuilder.finish()) if changed else module


def _operands(module: tvm.IRModule, value: relax.Expr) -> list[relax.Expr]:
    """Return the tensors that a broadcasting function is called with; none for other calls."""
    if not isinstance(value, relax.Call) or not value.op.same_as(_CALL_TIR):
        return []
    pattern = (module[value.args[0]].attrs or {}).get("op_pattern")
    if pattern is None or int(pattern) > _BROADCAST:
        return []
    return list(value.args[1].fields)


def _repeats(operand: relax.Var, result: relax.Var) -> bool:
    """Tell whether one result takes more elements than an operand has."""
    if not isinstance(operand.ty, relax.TensorType) or not isinstance(result.ty, relax.TensorType):
        return False
    return math.prod(shape_of(operand)) < math.prod(shape_of(result))


def _with_main(module: tvm.IRModule, function: relax.Function) -> tvm.IRModule:
    functions = dict(module.functions.items())
    functions[module.get_global_var("main")] = function
    return tvm.IRModule(functions, attrs=module.attrs)
