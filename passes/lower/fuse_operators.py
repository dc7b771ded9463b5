"""Groups elementwise operators with the kernel before them, and notes each kernel's layers.

Runs on legalized modules, before ``FuseTIR`` makes one function of each group. ``FuseOps`` drops
the name of a group's result, and makes one function of equal groups, with the names of the first:
each call is therefore matched against the module before it. Numerics: exact.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Mapping

import tvm
from tvm import relax

from hone.passes.apply import apply
from hone.targets.schedule.machine import Machine

from .fuse_rows import FuseRows
from .separate_broadcasts import RemoveSeparations, SeparateBroadcasts

ATTRIBUTE = "hone.kernel_layers"


def _bindings(func: relax.Function) -> Iterator[relax.VarBinding]:
    for block in func.body.blocks:
        for binding in block.bindings:
            if isinstance(binding, relax.VarBinding):
                yield binding


def _callee(value: relax.Expr) -> str | None:
    """Return the name of the function that a binding calls, if it calls one."""
    if not isinstance(value, relax.Call):
        return None
    if isinstance(value.op, tvm.ir.GlobalVar):
        return str(value.op.name_hint)
    if value.args and isinstance(value.args[0], tvm.ir.GlobalVar):
        return str(value.args[0].name_hint)
    return None


def _identity(value: object, names: Mapping[str, Hashable]) -> Hashable:
    """Return what two expressions have in common exactly if they compute the same.

    Parameters
    ----------
    value : Expr
        Of a binding, or an argument of one.
    names : mapping of str to hashable
        What variables stand for; others stand for themselves.
    """
    if isinstance(value, relax.Var):
        return names.get(str(value.name), str(value.name))
    if isinstance(value, tvm.ir.GenericConst):
        return "constant", value.value.__dlpack_device__(), value.value.data_ptr()
    if isinstance(value, tvm.ir.GlobalVar):
        return str(value.name_hint)
    if isinstance(value, tvm.ir.Op):
        return str(value.name)
    if isinstance(value, relax.Tuple):
        return tuple(_identity(field, names) for field in value.fields)
    if isinstance(value, relax.TupleGetItem):
        whole = _identity(value.tuple_value, names)
        return whole[value.index] if isinstance(whole, tuple) else ("item", value.index, whole)
    if isinstance(value, relax.Call):
        return _identity(value.op, names), *(_identity(a, names) for a in value.args)
    return str(value)


class _Origins:
    """The bindings before fusion, found again by what they compute."""

    def __init__(self, func: relax.Function) -> None:
        self._known: dict[Hashable, deque[str]] = {}
        self._unknown: dict[Hashable, int] = {}
        for binding in _bindings(func):
            found = self._known.setdefault(_identity(binding.value, {}), deque())
            found.append(str(binding.var.name))

    def name(self, binding: relax.VarBinding, names: Mapping[str, Hashable]) -> Hashable:
        """Return the binding's name before fusion; what stands for its value where it had none."""
        identity = _identity(binding.value, names)
        found = self._known.get(identity)
        if found:
            # Of two that compute the same from the same, each is found once.
            return found.popleft() if len(found) > 1 else found[0]
        if isinstance(binding.value, relax.Call):
            # A number, not the operands' identities, which would double wherever two of them
            # share one: a tuple is hashed as a tree.
            return self._unknown.setdefault(identity, len(self._unknown))
        return identity


@tvm.transform.module_pass(opt_level=0)
class FuseOperators:
    """Group operators, and write kernel → layers into the module's attribute.

    Parameters
    ----------
    machine : Machine, optional
        Decides which groups `FuseRows` joins; none are without it.
    """

    def __init__(self, machine: Machine | None = None) -> None:
        self._joins = [] if machine is None else [FuseRows(machine)]

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with one private function for each group."""
        transform = relax.transform
        module = tvm.transform.Sequential(
            [transform.AnnotateTIROpPattern(), transform.FoldConstant()]
        )(module)
        fused = apply(
            module, SeparateBroadcasts(), transform.FuseOps(), RemoveSeparations(), *self._joins
        )
        return fused.with_attr(ATTRIBUTE, _table(module, fused))


def _table(before: tvm.IRModule, after: tvm.IRModule) -> dict[str, list[list[str]]]:
    """Return function → for each of its calls the names of the bindings that it computes."""
    origins = _Origins(before["main"])
    functions = {variable.name_hint: func for variable, func in after.functions.items()}
    table: dict[str, list[list[str]]] = {}
    names: dict[str, Hashable] = {}
    for binding in _bindings(after["main"]):
        callee = _callee(binding.value)
        group = functions.get(callee)
        if isinstance(group, relax.Function):
            inner: dict[str, Hashable] = {
                str(parameter.name): _identity(argument, names)
                for parameter, argument in zip(group.params, binding.value.args, strict=True)
            }
            computed = []
            for part in _bindings(group):
                inner[str(part.var.name)] = name = origins.name(part, inner)
                if _callee(part.value) is not None:
                    computed.append(name)
            names[str(binding.var.name)] = _identity(group.body.body, inner)
        else:
            name = origins.name(binding, names)
            names[str(binding.var.name)] = name
            computed = [name]
        if callee is not None:
            table.setdefault(callee, []).append([n for n in computed if isinstance(n, str)])
    return table


def kernel_layers(module: tvm.IRModule) -> dict[str, tuple[str, ...]]:
    """Return kernel name → names of the bindings that it computes, in the order of execution.

    Parameters
    ----------
    module : IRModule
        Lowered by a pipeline that holds `FuseOperators`.
    """
    return {
        kernel: tuple(name for names in calls for name in names)
        for kernel, calls in call_layers(module).items()
    }


def call_layers(module: tvm.IRModule) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Return kernel name → for each of its calls, in their order, the bindings that it computes.

    Parameters
    ----------
    module : IRModule
        As for `kernel_layers`.
    """
    table = (module.attrs or {}).get(ATTRIBUTE, {})
    return {
        str(kernel): tuple(tuple(str(name) for name in names) for names in calls)
        for kernel, calls in table.items()
    }
