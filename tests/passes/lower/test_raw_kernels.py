"""Kernels as functions of pointers."""

from __future__ import annotations

import tvm
from tvm.ir import assert_structural_equal
from tvm.script import tirx as T  # noqa: N812

from hone.passes.apply import apply
from hone.passes.lower.export_kernels import ExportKernels
from hone.passes.lower.raw_kernels import RAW, RawKernels, is_static


@T.prim_func(s_tir=True)
def double(a: T.Buffer((3, 5), "float32"), b: T.Buffer((3, 5), "float32")):
    T.func_attr({"tirx.noalias": True})
    for i, j in T.grid(3, 5):
        with T.sblock("double"):
            vi, vj = T.axis.remap("SS", [i, j])
            b[vi, vj] = a[vi, vj] * T.float32(2)


@T.prim_func(s_tir=True)
def any_length(a: T.handle, b: T.handle):
    n = T.int64()
    x = T.match_buffer(a, (n,), "float32")
    y = T.match_buffer(b, (n,), "float32")
    for i in range(n):
        with T.sblock("copy"):
            vi = T.axis.spatial(n, i)
            y[vi] = x[vi]


def test_parameters_become_pointers_and_the_symbol_goes() -> None:
    module = tvm.IRModule({"double": double.with_attr("global_symbol", "double")})
    func = apply(module, RawKernels())["double"]
    assert [str(parameter.ty) for parameter in func.params] == ['T.handle("float32", "global")'] * 2
    assert "global_symbol" not in func.attrs
    assert func.attrs["tirx.noalias"]
    assert func.attrs[RAW]
    assert module["double"].attrs["global_symbol"] == "double"


def test_functions_of_unknown_shapes_are_left_alone() -> None:
    module = tvm.IRModule({"any_length": any_length})
    assert is_static(double)
    assert not is_static(any_length)
    assert_structural_equal(apply(module, RawKernels()), module)
    assert_structural_equal(apply(module, ExportKernels()), module)


def test_raw_kernels_get_symbols_that_no_library_has() -> None:
    module = apply(tvm.IRModule({"double": double}), RawKernels(), ExportKernels())
    text = module["double"].script()
    assert module["double"].attrs["global_symbol"] == "hone_kernel_double"
    assert '"storage_alignment", 64' in text
    assert '"device_id", 0' in text
    assert text.rstrip().endswith("return 0")
