"""Completes raw kernels: a symbol for the linker, a result, what code generation asks for.

Rewrites what `RawKernels` made. Runs after TVM's lowering, which would give a function with a
symbol TVM's own calling convention, and before ``LowerTVMBuiltin``, which asks for the device.
Numerics: exact.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.ir import PointerType
from tvm_ffi import DLDeviceType

from .promote_accumulators import tir_pipeline
from .raw_kernels import RAW

# kAllocAlignment of tvm/runtime/device_api.h.
ALIGNMENT_BYTES = 64

PREFIX = "hone_kernel_"
"""What the symbols of kernels begin with, so that none is a function of the C library."""


def _scope(func: tirx.PrimFunc) -> tirx.Stmt:
    """Return the body, saying where its temporary memory is and how its tensors are aligned."""
    default = tvm.ir.StringImm("default")
    facts = [
        (default, "device_type", int(DLDeviceType.kDLCPU)),
        (default, "device_id", 0),
        *(
            (parameter, "storage_alignment", ALIGNMENT_BYTES)
            for parameter in func.params
            if isinstance(parameter.ty, PointerType)
        ),
    ]
    body = func.body
    for node, key, value in facts:
        body = tirx.AttrStmt(node, key, tirx.IntImm("int32", value), body)
    return body


@tvm.transform.module_pass(opt_level=0)
class ExportKernels:
    """Give raw kernels their symbols."""

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with symbols; the same one where no function is raw."""
        functions = dict(module.functions.items())
        raw = {v: f for v, f in functions.items() if f.attrs and RAW in f.attrs}
        if not raw:
            return module
        for variable, func in raw.items():
            # The temporary memory of a body is freed at its end, so the function returns behind it.
            body = tirx.SeqStmt([_scope(func), tirx.Return(tirx.IntImm("int32", 0))])
            functions[variable] = func.with_body(body).with_attr(
                "global_symbol", PREFIX + variable.name_hint
            )
        return tvm.IRModule(functions, attrs=module.attrs)


def _raw_pipeline() -> tvm.transform.Pass:
    lower, finalize_host, finalize_device = tir_pipeline()

    def finalize() -> tvm.transform.Pass:
        return tvm.transform.Sequential([ExportKernels(), finalize_host()])

    return lower, finalize, finalize_device


# ``tvm.tirx.build`` takes a pipeline by name only.
RAW_PIPELINE = "hone-raw"
tirx.compilation_pipeline.register_tir_pipeline(RAW_PIPELINE, _raw_pipeline)
