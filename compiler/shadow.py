"""The un-fused shadow of a module: every layer's result, by kernels that nothing optimized.

It is what a compiled model is compared with layer by layer. Each operator is legalized alone;
no pass of hone runs, so that an error that shows here comes from the import.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax

from hone.passes.lower.weight_only import legalize_decode
from hone.passes.quantize.decode_operator import NAME as DECODE_WEIGHTS


def evaluate(
    module: tvm.IRModule, inputs: Mapping[str, np.ndarray], bindings: Iterable[str] = ()
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Run a module without any optimization.

    Parameters
    ----------
    module : tvm.IRModule
        One function ``main`` with static shapes.
    inputs : mapping of str to ndarray
        By parameter name.
    bindings : iterable of str
        Names of bindings whose values are wanted; those that do not exist or that are no tensors
        are left out of the result.

    Returns
    -------
    list of ndarray
        The function's results.
    dict of str to ndarray
        Values of the bindings that were asked for.
    """
    shadow, names = _with_results(module, frozenset(bindings))
    shadow = tvm.transform.Sequential(
        [
            relax.transform.DecomposeOpsForInference(),
            relax.transform.LegalizeOps({DECODE_WEIGHTS: legalize_decode}),
            relax.transform.FoldConstant(),
        ]
    )(shadow)
    executable = tvm.compile(
        shadow, tvm.target.Target("llvm"), relax_pipeline=relax.get_pipeline("default_build")
    )
    machine = relax.VirtualMachine(executable, tvm.cpu())
    feeds = [
        tvm.runtime.tensor(np.asarray(inputs[p.name], order="C")) for p in module["main"].params
    ]
    values = [v.numpy() for v in machine["main"](*feeds)]
    count = len(values) - len(names)
    return values[:count], dict(zip(names, values[count:], strict=True))


def _with_results(
    module: tvm.IRModule, wanted: frozenset[str]
) -> tuple[tvm.IRModule, tuple[str, ...]]:
    """Return a module whose `main` gives its results, then the named bindings, as one tuple."""
    function = module["main"]
    blocks = list(function.body.blocks)
    names: list[str] = []
    extra: list[Any] = []
    for block in blocks:
        for binding in block.bindings:
            is_tensor = isinstance(binding.var.ty, relax.TensorType)
            if binding.var.name in wanted and is_tensor:
                names.append(binding.var.name)
                extra.append(binding.var)
    body = function.body.body
    others = {v: f for v, f in module.functions.items() if v.name_hint != "main"}
    bb = relax.BlockBuilder(tvm.IRModule(others))
    with bb.function("main", params=list(function.params)):
        with bb.dataflow():
            for block in blocks:
                for binding in block.bindings:
                    bb.emit_normalized(binding)
            fields = (
                [relax.TupleGetItem(body, i) for i in range(len(body.ty.fields))]
                if isinstance(body.ty, relax.TupleType)
                else [body]
            )
            result = bb.emit_output(relax.Tuple([*fields, *extra]))
        bb.emit_func_output(result)
    return bb.get(), tuple(names)
