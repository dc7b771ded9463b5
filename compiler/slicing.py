"""A batch in slices, which threads take through the network one each.

Decided before anything is lowered: what follows compiles one slice for one thread, and the code
around the kernels runs all of them (`host_code`). A model whose samples cannot be told apart, or
whose outputs do not have them along their first axis, is compiled as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import tvm
from tvm import relax
from tvm.ir import Op

from hone.passes.apply import apply
from hone.passes.graph.batch_rules_of_levels import own_ops
from hone.passes.graph.dataflow import Dataflow, is_dataflow, shape_of, variables
from hone.passes.graph.rebatch import Rebatch
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.slices import LayerLoad, choose_slice
from hone.targets.target import Target

from .errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Slicing:
    """What is compiled, and how often a run does it.

    Parameters
    ----------
    module : IRModule
        For one slice; the model itself where there is one.
    threads : int
        Threads that share the kernels of a slice.
    count : int
        Slices of a run.
    parts : int
        Threads that take slices side by side.
    """

    module: tvm.IRModule
    threads: int
    count: int = 1
    parts: int = 1


def slice_batch(
    module: tvm.IRModule,
    target: Target,
    *,
    threads: int,
    decided: Mapping[str, str] | None = None,
) -> Slicing:
    """Cut the batch of a model where that is modelled faster.

    Parameters
    ----------
    module : IRModule
        One Relax function ``main`` of operators.
    target : Target
        What to compile for.
    threads : int
        Threads of one run.
    decided : mapping of str to str, optional
        What tuning found better than the model's first choice.
    """
    whole = Slicing(module=module, threads=threads)
    batch = _batch(module)
    loads = _loads_of_samples(module) if batch >= threads else None
    if loads is None:
        return whole
    machine = Machine.of(target, threads)
    machine = replace(machine, decided=tuple(sorted((decided or {}).items())))
    images = choose_slice(machine, batch=batch, layers=loads)
    sliced = _rebatched(module, images) if images else None
    if sliced is None:
        return whole
    count = batch // images
    return Slicing(module=sliced, threads=1, count=count, parts=min(threads, count))


def options_of(
    module: tvm.IRModule, target: Target, *, threads: int
) -> tuple[str, tuple[str, ...]] | None:
    """Return the name of the choice for a model and its options, the model's own first.

    None where there is none to make.

    Parameters
    ----------
    module, target, threads
        As for `slice_batch`.
    """
    batch = _batch(module)
    loads = _loads_of_samples(module) if batch >= threads else None
    if loads is None:
        return None
    asked: dict[str, tuple[str, ...]] = {}
    machine = replace(Machine.of(target, threads), asked=asked)
    choose_slice(machine, batch=batch, layers=loads)
    ((name, options),) = asked.items()
    return name, options


def _loads_of_samples(module: tvm.IRModule) -> list[LayerLoad] | None:
    """Return what layers do for a sample; None where samples cannot be told apart."""
    single = _rebatched(module, 1) if _batch(module) > 1 else None
    return None if single is None else _loads(single["main"])


def _batch(module: tvm.IRModule) -> int:
    """Return the leading extent that all inputs share; 1 where there is no batch to cut."""
    function = module["main"]
    if not is_dataflow(function):
        return 1
    leading = {shape[:1] for param in function.params if (shape := _static(param.ty)) is not None}
    if len(leading) != 1 or any(_static(param.ty) is None for param in function.params):
        return 1
    return next(iter(*leading), 1)


def _rebatched(module: tvm.IRModule, batch: int) -> tvm.IRModule | None:
    """Return the module for fewer samples; None where they cannot be told apart."""
    try:
        smaller = apply(module, Rebatch(batch))
    except ModelError:
        return None
    outputs = zip(_outputs(module), _outputs(smaller), strict=True)
    factor = _batch(module) // batch
    for before, after in outputs:
        if before[1:] != after[1:] or before[:1] != tuple(factor * n for n in after[:1]):
            return None
    return smaller


def _outputs(module: tvm.IRModule) -> list[tuple[int, ...]]:
    return [shape_of(output) for output in Dataflow(module["main"]).outputs]


def _static(ty: tvm.ir.Type) -> tuple[int, ...] | None:
    if not isinstance(ty, relax.TensorType) or not isinstance(ty.shape, relax.ShapeExpr):
        return None
    if not all(isinstance(extent, tvm.tirx.IntImm) for extent in ty.shape):
        return None
    return tuple(int(extent) for extent in ty.shape)


def _loads(function: relax.Function) -> list[LayerLoad]:
    """Return what the layers with weights or windows do; the rest joins their kernels."""
    found = []
    fed = set(function.params)
    for binding in Dataflow(function).bindings:
        value = binding.value
        if fed.intersection(variables(value)):
            fed.add(binding.var)
        if not isinstance(value, relax.Call) or value.op not in _LAYERS:
            continue
        operands = [arg for arg in value.args if isinstance(arg.ty, relax.TensorType)]
        sizes = {True: _bytes(binding.var), False: 0}
        for operand in operands:
            sizes[operand in fed] += _bytes(operand)
        products = 0
        if value.op in _PRODUCTS:
            weight = shape_of(operands[1])
            terms = weight[-2] if value.op == _MATMUL else prod(weight[1:])
            products = prod(shape_of(binding.var)) * terms
        found.append(
            LayerLoad(products=products, activation_bytes=sizes[True], weight_bytes=sizes[False])
        )
    return found


def _bytes(expression: relax.Expr) -> int:
    dtype = tvm.runtime.DataType(str(expression.ty.dtype))
    return prod(shape_of(expression)) * int(dtype.itemsize)


def _ops(*names: str) -> frozenset[Op]:
    return frozenset(Op.get(f"relax.{name}") for name in names)


_MATMUL = Op.get("relax.matmul")
_PRODUCTS = (
    _ops("matmul", "nn.conv1d", "nn.conv2d", "nn.conv3d")
    | _ops("nn.conv1d_transpose", "nn.conv2d_transpose", "nn.conv3d_transpose")
    | frozenset(own_ops("conv2d_int8", "dense_int8"))
)
_LAYERS = _PRODUCTS | _ops("nn.max_pool2d", "nn.avg_pool2d", "nn.softmax", "nn.layer_norm")
