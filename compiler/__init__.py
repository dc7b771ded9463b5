"""hone: make a trained ONNX model smaller and faster, and keep only what was measured better.

The public names are resolved on first use, so that ``import hone`` and ``hone --help`` stay light.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import HoneError

if TYPE_CHECKING:
    from .driver import compile
    from .importer import load
    from .improve import build
    from .package import Package
    from .targets.target import Target

# TVM reads both once, when its first thread pool starts: by default it takes half the processors,
# a pool cannot grow afterwards, and it pins the calling thread.
os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))
os.environ.setdefault("TVM_BIND_THREADS", "0")

__version__ = "0.1.0"
__all__ = ["HoneError", "Package", "Target", "__version__", "build", "compile", "load", "runtime"]

_HOMES = {
    "build": "hone.improve",
    "compile": "hone.driver",
    "load": "hone.importer",
    "Package": "hone.package",
    "Target": "hone.targets.target",
}
_MODULES = {"models", "passes", "runtime", "targets"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"hone.{name}")
    raise AttributeError(f"module 'hone' has no attribute {name!r}")
