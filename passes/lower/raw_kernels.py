"""Gives kernels the parameters of C functions: one pointer for each tensor.

Rewrites every PrimFunc whose parameters are all tensors of static shapes. Runs after scheduling,
before TVM's lowering, which leaves a function without a global symbol as it is; `ExportKernels`
finishes what it leaves. Numerics: exact; a call no longer checks shapes, types and alignment.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.ir import PointerType, PrimType
from tvm.tirx.buffer import is_buffer_var

RAW = "hone.raw"
"""Attribute of the functions that were rewritten."""


def is_static(func: tirx.PrimFunc) -> bool:
    """Say whether a function takes nothing but tensors of known shapes without strides."""
    return all(
        is_buffer_var(parameter)
        and not parameter.ty.strides
        and all(isinstance(extent, tirx.IntImm) for extent in parameter.ty.shape)
        for parameter in func.params
    )


def _raw(func: tirx.PrimFunc) -> tirx.PrimFunc:
    pointers, body = [], []
    for tensor in func.params:
        pointer = tirx.Var(tensor.name, PointerType(tensor.ty.dtype, tensor.ty.storage_scope))
        pointers.append(pointer)
        # TVM's wrapper would read the offset from the tensor and refuse any but 0.
        if isinstance(offset := tensor.ty.elem_offset, tirx.Var):
            body.append(tirx.Bind(offset, tirx.const(0, offset.ty.dtype)))
        body.append(tirx.DeclBuffer(tensor, data=pointer))
    body.append(func.body)
    attributes = {key: value for key, value in func.attrs.items() if key != "global_symbol"}
    return tirx.PrimFunc(
        pointers,
        tirx.SeqStmt(body),
        ret_type=PrimType("int32"),
        attrs=tvm.ir.make_node("ir.DictAttrs", **attributes, **{RAW: True}),
    )


@tvm.transform.module_pass(opt_level=0)
class RawKernels:
    """Turn functions of tensors into functions of pointers."""

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with such functions; the same one where there is none."""
        found = {
            variable: func
            for variable, func in module.functions.items()
            if isinstance(func, tirx.PrimFunc) and is_static(func)
        }
        if not found:
            return module
        functions = dict(module.functions.items())
        functions.update({variable: _raw(func) for variable, func in found.items()})
        return tvm.IRModule(functions, attrs=module.attrs)
