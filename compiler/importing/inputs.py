"""Gives every input of an ONNX graph a static shape, from the model and ``--shape`` arguments."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Final

import onnx

from hone.errors import UsageError
from hone.signature import TensorSpec

from .graph import Problem, dtype_name, nearest
from .operators import DTYPES

Shape = Sequence[int]

LARGEST_SIZE: Final = 2**31 - 1
"""Of one dimension."""


class InputError(Exception):
    """An input cannot be used; carries the `Problem`."""

    def __init__(self, node: str, op: str, message: str, fix: str = "") -> None:
        self.problem = Problem(node=node, op=op, message=message, fix=fix)
        super().__init__(str(self.problem))


def resolve_inputs(
    graph: onnx.GraphProto, shapes: Mapping[str, Shape]
) -> tuple[list[TensorSpec], list[Problem]]:
    """Return the inputs that have a shape, and a problem for each that has none.

    Parameters
    ----------
    graph : onnx.GraphProto
        Initializers that it lists as inputs are left out.
    shapes : mapping of str to sequence of int
        Shapes of inputs with dynamic dimensions. A named dimension that is given for one input
        holds for the others.

    Raises
    ------
    UsageError
        A shape is no sequence of numbers that ONNX can hold.
    """
    shapes = {name: _sizes(name, shape) for name, shape in shapes.items()}
    stored = {t.name for t in graph.initializer}
    stored |= {t.values.name for t in graph.sparse_initializer}
    inputs = [i for i in graph.input if i.name not in stored]
    names = [i.name for i in inputs]
    problems = []
    for name in shapes:
        if name not in names:
            weight = "it is a weight, its shape is stored"
            problems.append(
                Problem(
                    node=name,
                    op="--shape",
                    message="the model has no such input",
                    fix=weight if name in stored else nearest(name, names),
                )
            )
    symbols, clashes = _symbols(inputs, shapes)
    problems += clashes
    specs = []
    for value in inputs:
        try:
            specs.append(_resolve_input(value, shapes.get(value.name), symbols))
        except InputError as error:
            problems.append(error.problem)
    return specs, problems


def _sizes(name: str, shape: Shape) -> tuple[int, ...]:
    sizes: tuple[int, ...] | None
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = None
    if sizes is None or any(abs(size) > LARGEST_SIZE for size in sizes):
        raise UsageError(
            f"required is a sequence of whole numbers up to {LARGEST_SIZE}, given is {shape!r}",
            where=f"shape of {name!r}",
        )
    return sizes


def _symbols(
    inputs: Sequence[onnx.ValueInfoProto], shapes: Mapping[str, Shape]
) -> tuple[dict[str, int], list[Problem]]:
    """Return the values of named dimensions, and where two of them clash."""
    symbols: dict[str, int] = {}
    clashes = []
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        given = shapes.get(value.name, ())
        if len(dims) != len(given):
            continue
        for dim, size in zip(dims, given, strict=True):
            name = dim.dim_param
            if name and symbols.setdefault(name, size) != size:
                message = f"dimension {name!r} is {size} here and {symbols[name]} in another input"
                clashes.append(Problem(node=value.name, op="--shape", message=message))
    return symbols, clashes


def _resolve_input(
    value: onnx.ValueInfoProto, given: Shape | None, symbols: Mapping[str, int]
) -> TensorSpec:
    name = value.name
    kind = value.type.WhichOneof("value") or "unknown type"
    if kind != "tensor_type":
        raise InputError(name, "input", f"it is a {kind.removesuffix('_type')}, not a tensor")
    tensor = value.type.tensor_type
    dtype = dtype_name(tensor.elem_type)
    if dtype not in DTYPES:
        raise InputError(name, "input", f"element type {dtype} is unsupported")
    declared: list[int | str] | None = None
    if tensor.HasField("shape"):
        declared = [
            d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim
        ]
    shape = _declared(name, declared, symbols) if given is None else _given(name, declared, given)
    if any(size < 1 for size in shape):
        raise InputError(name, "input", f"shape {_list(shape)} has no elements; 1 is the least")
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def _declared(
    name: str, declared: Sequence[int | str] | None, symbols: Mapping[str, int]
) -> tuple[int, ...]:
    if declared is None:
        raise InputError(name, "input", "its rank is unknown", f"give --shape '{name}:[1,...]'")
    sizes = [d if isinstance(d, int) else symbols.get(d) for d in declared]
    if any(s is None for s in sizes):
        example = ",".join(str(s) if s else "1" for s in sizes)
        raise InputError(
            name,
            "input",
            f"shape {_list(declared)} has a dynamic dimension without a value",
            f"give --shape '{name}:[{example}]'",
        )
    return tuple(s for s in sizes if s is not None)


def _given(name: str, declared: Sequence[int | str] | None, given: Shape) -> tuple[int, ...]:
    fits = declared is None or (
        len(given) == len(declared)
        and all(isinstance(d, str) or d == g for d, g in zip(declared, given, strict=True))
    )
    if not fits:
        model = "" if declared is None else _list(declared)
        raise InputError(name, "--shape", f"{_list(given)} does not fit the model's {model}")
    return tuple(int(size) for size in given)


def _list(sizes: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, sizes))}]"
