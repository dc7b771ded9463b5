"""How much memory activations need, by the plan that is made at compile time."""

from __future__ import annotations

import math

import tvm
from tvm import relax

from hone import pipeline
from hone.model import Model
from hone.targets.target import Target


def activation_bytes(model: Model, target: Target, *, threads: int) -> int:
    """Return the bytes of the storage that all activations of a run share, outputs included.

    Inputs are the caller's and do not count, nor does what a kernel needs for itself.

    Parameters
    ----------
    model : Model
        From `hone.load`, or compressed.
    target : Target
        What it would be compiled for: fusion decides which activations exist.
    threads : int
        Threads of one run.
    """
    module = pipeline.lower(model.module, target, threads=threads)
    transform = relax.transform
    module = tvm.transform.Sequential(
        [
            transform.RewriteDataflowReshape(),
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            transform.LowerAllocTensor(),
        ]
    )(module)
    allocate = tvm.ir.Op.get("relax.memory.alloc_storage")
    sizes: list[int] = []

    def visit(node: relax.Expr) -> None:
        if isinstance(node, relax.Call) and node.op == allocate:
            sizes.append(math.prod(int(extent) for extent in node.args[0].values))

    relax.analysis.post_order_visit(module["main"], visit)
    return sum(sizes)
