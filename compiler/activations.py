"""How much memory the activations of one run need."""

from __future__ import annotations

import math

import tvm
from tvm import relax

from hone.targets.target import Target

from . import pipeline

_ALLOC = tvm.ir.Op.get("relax.memory.alloc_storage")


def activation_bytes(lowered: tvm.IRModule, target: Target, *, threads: int) -> int:
    """Return the bytes that activations share in one run, as planned ahead of time.

    Parameters
    ----------
    lowered : IRModule
        Kernels, scheduled or not, and a ``main`` that calls them.
    target : Target
        What it is compiled for.
    threads : int
        Threads of one run.

    Returns
    -------
    int
        The storages of the plan, each once, outputs included; inputs are the caller's and not among
        them. What a kernel allocates for itself is not seen.
    """
    calls, memory, *_ = pipeline.finalize_stages()
    with target.tvm_target(threads):
        planned = memory.run(calls.run(lowered))
    sizes: list[int] = []

    def visit(expression: relax.Expr) -> None:
        if isinstance(expression, relax.Call) and expression.op.same_as(_ALLOC):
            sizes.append(math.prod(int(extent) for extent in expression.args[0].values))

    for function in planned.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return sum(sizes)


def lowered_activation_bytes(module: tvm.IRModule, target: Target, *, threads: int) -> int:
    """Return the same for a module that is not lowered yet.

    Parameters
    ----------
    module : IRModule
        Operators.
    target, threads
        As above.
    """
    lowered = pipeline.lower(module, target, threads=threads)
    return activation_bytes(lowered, target, threads=threads)
