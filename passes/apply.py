"""Applies passes one after the other."""

from __future__ import annotations

import tvm

from hone.passes import ffi_errors as ffi_errors  # a pass must be able to raise


def apply(module: tvm.IRModule, *passes: tvm.transform.Pass) -> tvm.IRModule:
    """Return the module after the passes, in order.

    TVM's decorators make a pass of a class in a way that type checkers do not see; this is the
    one place that calls one.
    """
    return tvm.transform.Sequential(list(passes))(module)
