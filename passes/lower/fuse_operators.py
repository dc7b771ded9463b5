"""Groups elementwise operators with the kernel before them, and notes each kernel's layers.

Runs on legalized modules, before ``FuseTIR`` makes one function of each group. ``FuseOps`` keeps
the names of inner bindings and drops that of a group's result, so the names are matched against
the module before it. Numerics: exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import tvm
from tvm import relax, tirx

ATTRIBUTE = "hone.kernel_layers"


def _callee(value: relax.Expr) -> str | None:
    """Return the name of the function that a binding calls, if it calls one."""
    if not isinstance(value, relax.Call):
        return None
    if isinstance(value.op, tvm.ir.GlobalVar):
        return str(value.op.name_hint)
    if value.args and isinstance(value.args[0], tvm.ir.GlobalVar):
        return str(value.args[0].name_hint)
    return None


def _calls(func: relax.Function) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield ``(binding name, callee, names of the arguments)`` of every call of a function."""
    for block in func.body.blocks:
        for binding in block.bindings:
            if not isinstance(binding, relax.VarBinding):
                continue
            callee = _callee(binding.value)
            if callee is None:
                continue
            arguments = binding.value.args
            if len(arguments) > 1 and isinstance(arguments[1], relax.Tuple):
                arguments = arguments[1].fields
            names = tuple(str(a.name) for a in arguments if isinstance(a, relax.Var))
            yield str(binding.var.name), callee, names


@tvm.transform.module_pass(opt_level=0)
class FuseOperators:
    """Group operators, and write kernel → layers into the module's attribute."""

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with one private function for each group."""
        transform = relax.transform
        module = tvm.transform.Sequential(
            [transform.AnnotateTIROpPattern(), transform.FoldConstant()]
        )(module)
        by_use = {
            (callee, argument): name
            for name, callee, arguments in _calls(module["main"])
            for argument in arguments
        }
        fused = transform.FuseOps()(module)
        groups: dict[str, list[str]] = {}
        for variable, func in fused.functions.items():
            if isinstance(func, tirx.PrimFunc) or variable.name_hint == "main":
                continue
            names: list[str] = []
            for name, callee, arguments in _calls(func):
                known = [
                    by_use[callee, a] for a in arguments if a in names and (callee, a) in by_use
                ]
                names.append(known[0] if known else name)
            groups[variable.name_hint] = names
        table: dict[str, list[str]] = {}
        for name, callee, _ in _calls(fused["main"]):
            table.setdefault(callee, []).extend(groups.get(callee, [name]))
        return fused.with_attr(ATTRIBUTE, table)


def kernel_layers(module: tvm.IRModule) -> dict[str, tuple[str, ...]]:
    """Return kernel name → names of the bindings that it computes, in the order of execution.

    Parameters
    ----------
    module : IRModule
        Lowered by a pipeline that holds `FuseOperators`.
    """
    table = (module.attrs or {}).get(ATTRIBUTE, {})
    return {str(kernel): tuple(str(name) for name in names) for kernel, names in table.items()}
