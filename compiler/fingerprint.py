"""Hashes of a module and of a dataset by content, for the keys of caches."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Protocol

import numpy as np
from tvm import relax
from tvm.ir import GenericConst

from hone.passes.graph.dataflow import Dataflow

if TYPE_CHECKING:
    import tvm

    from .data import Dataset


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


def of_module(module: tvm.IRModule) -> str:
    """Return the sha256, in hex, of ``main``: names, types, operators, attributes, every weight.

    The attributes of ``main`` itself count: passes leave notes there that kernels depend on.
    Equal for two modules that were built apart from the same file. Not TVM's structural hash,
    which has 64 bits and leaves out the names of variables.

    Raises
    ------
    ModelError
        ``main`` is not one dataflow block.
    """
    function = module["main"]
    digest = hashlib.sha256()
    for name, value in sorted((function.attrs or {}).items()):
        _text(digest, "attribute", str(name), type(value).__name__, str(value))
    for param in function.params:
        _text(digest, "param", str(param.name), str(param.ty))
    for binding in Dataflow(function).bindings:
        _text(digest, "binding", str(binding.var.name), str(binding.var.ty))
        _expression(digest, binding.value)
    _text(digest, "result")
    _expression(digest, function.body.body)
    return digest.hexdigest()


def of_dataset(dataset: Dataset, *, labels: bool = False) -> str:
    """Return the sha256, in hex, of a dataset's inputs: names, types, shapes, every value.

    The place where the data came from does not count.

    Parameters
    ----------
    dataset : Dataset
        Any.
    labels : bool
        Whether its labels count.
    """
    digest = hashlib.sha256()
    for name, array in sorted(dataset.inputs.items()):
        _text(digest, name)
        _array(digest, array)
    if labels and dataset.labels is not None:
        _text(digest, "labels")
        _array(digest, dataset.labels)
    return digest.hexdigest()


def _expression(digest: _Hash, expr: relax.Expr) -> None:
    if isinstance(expr, relax.Var):
        _text(digest, "var", str(expr.name))
    elif isinstance(expr, GenericConst):
        _array(digest, expr.value.numpy())
    elif isinstance(expr, relax.Tuple):
        _text(digest, "tuple", str(len(expr.fields)))
        for field in expr.fields:
            _expression(digest, field)
    elif isinstance(expr, relax.TupleGetItem):
        _text(digest, "item", str(expr.index))
        _expression(digest, expr.tuple_value)
    elif isinstance(expr, relax.Call):
        _text(digest, "call", str(expr.op), str(expr.attrs), str(len(expr.args)))
        for argument in expr.args:
            _expression(digest, argument)
    else:
        _text(digest, type(expr).__name__, str(expr))


def _array(digest: _Hash, array: np.ndarray) -> None:
    _text(digest, str(array.dtype), str(array.shape))
    digest.update(np.ascontiguousarray(array).tobytes())


def _text(digest: _Hash, *parts: str) -> None:
    # JSON keeps the parts apart: ("ab", "c") is not ("a", "bc").
    digest.update(json.dumps(parts).encode())
