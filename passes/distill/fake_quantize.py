"""Fake quantization: float tensors that hold only what their integers will hold.

Rewrites reads of activations, so that a network is trained with the error that its integers will
make. Runs on a training view (`LiftConstants`), before ``Gradient``. Numerics: the forward value is
`hone.passes.quantize.qparams.dequantize` of `quantize`, bit for bit; the gradient is the
straight-through estimator.

Importing this module registers the operator ``hone.fake_quantize``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import tvm
from tvm import relax, te
from tvm.ir import Op

from hone.errors import ModelError
from hone.passes.graph.dataflow import PART, Dataflow, Rebuilder, with_args
from hone.passes.quantize import kernels
from hone.passes.quantize.qparams import PerTensor, QParams
from hone.passes.quantize.quantize_int8 import QuantizedRead

NAME = "hone.fake_quantize"


def fake_quantize(data: relax.Expr, qparams: QParams) -> relax.Call:
    """Return a float32 tensor rounded to the real values of its levels.

    ``scale × (level - zero_point)``. Its gradient is the straight-through estimator: g where the
    value lies inside the range of the levels, 0 where it saturates (Bengio, Léonard and Courville
    2013, "Estimating or Propagating Gradients Through Stochastic Neurons"; Jacob et al., CVPR 2018,
    section 3). With scale 0.5, zero point 3 and uint8, 1.3 becomes 1.5 with slope 1, and -2 becomes
    -1.5 with slope 0.

    Parameters
    ----------
    data : relax.Expr
        float32, any shape.
    qparams : QParams
        Per tensor; levels of 8 bits.

    Raises
    ------
    ModelError
        The parameters are not per tensor, or the data not float32.
    """
    if not isinstance(qparams.granularity, PerTensor):
        raise ModelError("an activation is quantized per tensor", where=NAME)
    call = relax.Call(
        Op.get(NAME),
        [data, relax.const(qparams.scale), relax.const(qparams.zero_point)],
        tvm.ir.make_node("ir.DictAttrs", out_dtype=qparams.type.dtype),
    )
    _infer(call)
    return call


@tvm.transform.module_pass(opt_level=0)
class FakeQuantize:
    """Round what readers take to the levels that they will take.

    Parameters
    ----------
    reads : sequence of QuantizedRead
        From `hone.passes.quantize.quantize_int8.quantized_reads`. A tensor is found through changes
        of layout, so that reads of an NHWC module fit its NCHW view.

    Raises
    ------
    ModelError
        Some reads are not in the module; all are listed.
    """

    def __init__(self, reads: Sequence[QuantizedRead]) -> None:
        self._reads = tuple(reads)

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with rounded reads, or the very same one."""
        if not self._reads:
            return module
        function = module["main"]
        graph = Dataflow(function)
        wanted: dict[str, dict[str, QParams]] = {}
        found: set[tuple[str, str]] = set()
        for read in self._reads:
            wanted.setdefault(read.reader, {})[read.tensor] = read.qparams
        rebuilder = Rebuilder(function)
        rounded: dict[relax.Var, relax.Var] = {}
        for binding in graph.bindings:
            tensors = wanted.get(str(binding.var.name))
            if tensors is None or not isinstance(binding.value, relax.Call):
                rebuilder.copy(binding)
                continue
            arguments = []
            for argument in binding.value.args:
                name = _source(graph, argument, tensors)
                if name is None:
                    arguments.append(rebuilder.use(argument))
                    continue
                found.add((str(binding.var.name), name))
                if argument not in rounded:
                    value = fake_quantize(rebuilder.use(argument), tensors[name])
                    rounded[argument] = rebuilder.emit(value, f"{name}{PART}rounded")
                arguments.append(rounded[argument])
            rebuilder.bind(binding.var, with_args(binding.value, arguments))
        missing = [r for r in self._reads if (r.reader, r.tensor) not in found]
        if missing:
            raise ModelError(
                "the training view lacks these reads",
                problems=[f"{read.tensor} by {read.reader}" for read in missing],
            )
        functions = dict(module.functions_items())
        functions[module.get_global_var("main")] = rebuilder.finish()
        return tvm.IRModule(functions, attrs=module.attrs)


def _source(graph: Dataflow, expr: relax.Expr, names: Mapping[str, QParams]) -> str | None:
    """Return the name of the tensor that an argument is in some layout, if it is one of them."""
    while isinstance(expr, relax.Var):
        if str(expr.name) in names:
            return str(expr.name)
        call = graph.call(expr, _PERMUTE)
        if call is None:
            break
        expr = call.args[0]
    return None


def _infer(call: relax.Call) -> relax.TensorType:
    data = call.args[0].ty
    if not isinstance(data, relax.TensorType) or str(data.dtype) != "float32":
        raise ModelError(f"data must be float32, not {data}", where=NAME)
    return data


def _compute(data: te.Tensor, scale: te.Tensor, zero_point: te.Tensor, *, dtype: str) -> te.Tensor:
    levels = kernels.quantize(data, scale, zero_point, out_dtype=dtype)
    return kernels.dequantize(levels, scale, zero_point)


def _legalize(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    kernel = partial(_compute, dtype=str(call.attrs["out_dtype"]))
    return builder.call_te(kernel, *call.args, primfunc_name_hint="fake_quantize")


def _gradient(
    _var: relax.Var, call: relax.Call, output: relax.Var, _builder: relax.BlockBuilder
) -> list[relax.Expr]:
    """Return g where the value lies within the levels, else 0; their parameters get none."""
    op = relax.op
    data, scale, zero_point = call.args
    levels = np.iinfo(str(call.attrs["out_dtype"]))
    step, point = scale.value.numpy(), zero_point.value.numpy()
    low, high = (
        relax.const((bound - point) * step, "float32") for bound in (levels.min, levels.max)
    )
    inside = op.logical_and(op.greater_equal(data, low), op.less_equal(data, high))
    nothing = [op.grad.no_grad(scale), op.grad.no_grad(zero_point)]
    return [op.where(inside, output, op.zeros_like(output)), *nothing]


def _register() -> None:
    tvm.ir._ffi_api.RegisterOp(NAME, "See hone.passes.distill.fake_quantize.")
    tvm.ir.register_op_attr(NAME, "FInferType", lambda call, _context: _infer(call))
    tvm.ir.register_op_attr(NAME, "FPurity", True)
    tvm.ir.register_op_attr(NAME, "FLegalize", _legalize)
    tvm.ir.register_op_attr(NAME, "FPrimalGradient", _gradient)


_PERMUTE = Op.get("relax.permute_dims")

_register()
