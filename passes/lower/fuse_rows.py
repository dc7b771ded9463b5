"""Makes one kernel of a 1x1 and a depthwise convolution, one of which alone reads the other.

Joins two groups of ``FuseOps``, epilogues included, where the machine gains by it. What lies
between is then a stage of a kernel, which `hone.targets.schedule.bands` or, where the depthwise
convolution comes first, `hone.targets.schedule.projection` keeps in a core's cache. Runs on grouped
modules before ``FuseTIR``. Numerics: exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import tvm
from tvm import relax

from hone.passes.graph.dataflow import Dataflow, Rebuilder, is_dataflow, shape_of
from hone.targets.schedule.bands import Chain, joins
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.projection import projects

from .anchors import DEPTHWISE, POINTWISE, ROLE

_CALL_TIR = tvm.ir.Op.get("relax.call_tir")
# TVM's OpPatternKind: elementwise (0) and broadcast, which leave elements where they are.
_BROADCAST = 1


@dataclass(frozen=True, kw_only=True)
class _Group:
    """A call of a group that begins with a convolution and goes on element by element.

    Parameters
    ----------
    call : relax.Call
        In ``main``.
    function : relax.Function
        The group.
    data, weight : relax.Expr
        What the convolution reads, inside the group.
    """

    call: relax.Call
    function: relax.Function
    data: relax.Expr
    weight: relax.Expr


def _group(module: tvm.IRModule, call: relax.Call | None, role: str) -> _Group | None:
    """Return the group that is called, if its first operator has the role."""
    if call is None or not isinstance(call.op, tvm.ir.GlobalVar):
        return None
    function = module[call.op]
    if not is_dataflow(function) or not isinstance(function.body.body, relax.Var):
        return None
    values = [binding.value for binding in function.body.blocks[0].bindings]
    if not all(isinstance(value, relax.Call) and value.op.same_as(_CALL_TIR) for value in values):
        return None
    first, *rest = [dict(module[value.args[0]].attrs or {}) for value in values]
    if first.get(ROLE) != role or any(int(a["op_pattern"]) > _BROADCAST for a in rest):
        return None
    data, weight = values[0].args[1].fields
    return _Group(call=call, function=function, data=data, weight=weight)


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Two groups, and which argument of the second the first computes."""

    first: _Group
    second: _Group
    position: int


@tvm.transform.module_pass(opt_level=0)
class FuseRows:
    """Join 1x1 convolutions with the depthwise ones behind them, or these with 1x1 ones behind.

    Parameters
    ----------
    machine : Machine
        Decides for each geometry.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with joined groups, or the very same module."""
        main = module["main"]
        if not is_dataflow(main):
            return module
        graph = Dataflow(main)
        pairs: dict[relax.Var, _Pair] = {}
        for binding in graph.bindings:
            pair = self._pair(module, graph, binding.var, taken=pairs)
            if pair is not None:
                pairs[binding.var] = pair
        if not pairs:
            return module
        functions = dict(module.functions.items())
        builder = relax.BlockBuilder(tvm.IRModule(functions, attrs=module.attrs))
        rebuilder = Rebuilder(main)
        for binding in graph.bindings:
            pair = pairs.get(binding.var)
            if pair is None:
                rebuilder.copy(binding)
                continue
            variable = builder.add_func(_joined(pair), _name(pair))
            rebuilder.bind(
                binding.var,
                relax.Call(variable, [rebuilder.use(argument) for argument in _arguments(pair)]),
            )
        builder.update_func(module.get_global_var("main"), rebuilder.finish())
        return builder.get()

    def _pair(
        self,
        module: tvm.IRModule,
        graph: Dataflow,
        var: relax.Var,
        *,
        taken: Mapping[relax.Var, _Pair],
    ) -> _Pair | None:
        """Return the groups that a binding's kernel is to compute; None for others.

        ``taken`` has the pairs before it: a kernel is joined once.
        """
        call = graph.call(var)
        depthwise = _group(module, call, DEPTHWISE)
        second = depthwise or _group(module, call, POINTWISE)
        if second is None:
            return None
        reads = [param.same_as(second.data) for param in second.function.params]
        if not any(reads):
            return None
        between = second.call.args[reads.index(True)]
        if not isinstance(between, relax.Var) or not graph.used_once(between) or between in taken:
            return None
        if not Dataflow(second.function).used_once(second.data):
            return None  # Its epilogue reads what lies between as well.
        first = _group(module, graph.call(between), POINTWISE if depthwise else DEPTHWISE)
        if first is None:
            return None
        batch, height, width, channels = shape_of(between)
        shape = (batch, height, width, channels)
        if depthwise is None:
            gain = projects(self._machine, shape, shape_of(var)[-1])
        else:
            gain = joins(self._machine, _chain(shape, first, second, shape_of(var)))
        return _Pair(first=first, second=second, position=reads.index(True)) if gain else None


def _chain(
    shape: tuple[int, int, int, int], first: _Group, second: _Group, result: tuple[int, ...]
) -> Chain:
    """Return the geometry of a 1x1 convolution and the depthwise one behind it."""
    taps_h, taps_w, _ = shape_of(second.weight)
    *_, pack = shape_of(first.weight)
    return Chain(
        shape=shape,
        depth=math.prod(shape_of(first.weight)[1:-1]),
        pack=pack,
        taps=(taps_h, taps_w),
        output=(result[1], result[2]),
    )


def _joined(pair: _Pair) -> relax.Function:
    """Return one group that computes both; every variable has a name of its own."""
    before = relax.utils.copy_with_new_vars(pair.first.function)
    behind = pair.second.function
    between = behind.params[pair.position]
    others = {
        param: relax.Var(f"{param.name}_behind", param.ty)
        for param in behind.params
        if not param.same_as(between)
    }
    rebuilder = Rebuilder(before, [*before.params, *others.values()])
    *inside, last = before.body.blocks[0].bindings
    for binding in inside:
        rebuilder.copy(binding)
    # No longer a result.
    rebuilder.replace(between, rebuilder.emit(rebuilder.use(last.value), "between"))
    for param, own in others.items():
        rebuilder.replace(param, own)
    for binding in behind.body.blocks[0].bindings:
        rebuilder.copy(binding)
    return rebuilder.finish(rebuilder.use(behind.body.body))


def _arguments(pair: _Pair) -> list[relax.Expr]:
    """Return what the joined group is called with."""
    others = [a for i, a in enumerate(pair.second.call.args) if i != pair.position]
    return [*pair.first.call.args, *others]


def _name(pair: _Pair) -> str:
    first, second = (str(g.call.op.name_hint) for g in (pair.first, pair.second))
    return f"{first}_{second.removeprefix('fused_')}"
