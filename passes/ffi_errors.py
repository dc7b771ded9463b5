"""Makes hone's own errors pass through TVM's call boundary as what they are.

A pass is called by way of C++, which turns an error of an unknown type into ``RuntimeError``.
"""

from __future__ import annotations

import tvm_ffi

from hone import errors

for _error in errors.HoneError.__subclasses__():
    tvm_ffi.register_error(_error.__name__, _error)
