"""Turns the QDQ form of a quantized model into integer operators.

Rewrites ``dequantize → operator → quantize`` with exactly the model's scales and zero points:
convolutions and matrix products with bias, residual addition and activation (`qdq_layers`),
additions, means, average pooling, and what only moves levels or picks among them (`level_moves`).
What does not fit stays in float, between the conversions that the model has. Runs first of all
passes, on the imported module: afterwards constants may be folded and layouts changed. Numerics: a
level may differ from that of float arithmetic by one, where the real value lies within float
rounding of the border of two levels; in additions within 2**-8 of a level.
"""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import Op

from hone.passes.apply import apply
from hone.passes.graph.dataflow import Dataflow, layer_of

from .qdq_reader import levels_of_dequantize
from .qdq_writer import QdqWriter
from .quantize_int8 import Quantization
from .slice_splits import SliceSplits

QDQ_ATTRIBUTE = "hone.qdq"
"""Marks a function whose conversions come from the model, not from hone's own quantization."""


def is_qdq(module: tvm.IRModule) -> bool:
    """Tell whether a module was imported from a model with quantization operators."""
    attrs = module["main"].attrs
    return attrs is not None and QDQ_ATTRIBUTE in attrs


def match_qdq(module: tvm.IRModule) -> Quantization:
    """Write an imported module in integers, and report what was done.

    Parameters
    ----------
    module : IRModule
        As it was imported, in NCHW; stays as it is.

    Returns
    -------
    Quantization
        The same module, and nothing quantized, for one that `is_qdq` denies.
    """
    if not is_qdq(module):
        return Quantization(module=module, quantized=(), skipped=(), conversions=())
    module = apply(module, SliceSplits())
    writer = QdqWriter(module["main"])
    function = writer.write().without_attr(QDQ_ATTRIBUTE)
    rewritten = module.clone()
    rewritten.update_func(module.get_global_var("main"), function)
    return Quantization(
        module=rewritten,
        quantized=tuple(writer.quantized),
        skipped=tuple(writer.skipped),
        conversions=_conversions(function),
    )


@tvm.transform.module_pass(opt_level=0)
class MatchQdq:
    """`match_qdq` as a pass."""

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module in integers."""
        return match_qdq(module).module


def _conversions(function: relax.Function) -> tuple[str, ...]:
    graph = Dataflow(function)
    return tuple(
        f"{layer_of(binding.var)} ({str(binding.value.op.name).rpartition('.')[2]})"
        for binding in graph.bindings
        if isinstance(binding.value, relax.Call)
        and (binding.value.op == _QUANTIZE or levels_of_dequantize(binding.value) is not None)
    )


_QUANTIZE = Op.get("hone.quantize")
