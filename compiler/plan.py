"""What a model of static shapes does in one run: kernels in order, on memory planned ahead.

The plan is read off the Relax function once its storage is planned. Whatever is not a straight
line of kernels over static memory (a branch, a call into the runtime, a shape that depends on
data) has no plan and is left to TVM's virtual machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeAlias

import tvm
from tvm import relax, tirx
from tvm.ir import GenericConst, GlobalVar, Op

from hone.passes.lower.export_kernels import ALIGNMENT_BYTES


class Region(StrEnum):
    """A piece of memory that a run is given."""

    WORKSPACE = "workspace"
    INPUT = "input"
    OUTPUT = "output"
    CONSTANT = "constant"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor begins.

    Parameters
    ----------
    region : Region
        Kind of memory.
    index : int
        Which of the inputs, outputs or constants; 0 for the workspace.
    offset_bytes : int
        From its beginning.
    """

    region: Region
    index: int = 0
    offset_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class KernelCall:
    """One kernel with the tensors that it is given.

    Parameters
    ----------
    kernel : str
        Name of the function.
    places : tuple of Place
        One for each parameter; results come last.
    """

    kernel: str
    places: tuple[Place, ...]


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Content that no kernel puts where it belongs.

    Parameters
    ----------
    target, source : Place
        Where to and where from.
    size_bytes : int
        How much.
    """

    target: Place
    source: Place
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a tensor looks like.

    Parameters
    ----------
    dtype : str
        As numpy names it.
    extents : tuple of int
        Dimensions.
    """

    dtype: str
    extents: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.extents) * int(tvm.runtime.DataType(self.dtype).itemsize)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run, or one slice of it.

    Parameters
    ----------
    inputs, outputs : tuple of Shape
        In order; those of a slice.
    constants : tuple of GenericConst
        Weights, each once.
    workspace_bytes : int
        Of the memory that activations share.
    loads : tuple of Copy
        Before the first call: inputs whose slices do not all begin where kernels want them.
    calls : tuple of KernelCall
        In order.
    copies : tuple of Copy
        After the last call: outputs that no kernel writes (an input, a constant, a part of another
        output), or whose slices do not all begin where kernels want them.
    slices : int
        How often a run does all this; the n-th time with the n-th part of each input and output.
    parts : int
        How many threads do it side by side, each in a workspace of its own.
    """

    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    constants: tuple[GenericConst, ...]
    workspace_bytes: int
    calls: tuple[KernelCall, ...]
    copies: tuple[Copy, ...]
    loads: tuple[Copy, ...] = ()
    slices: int = 1
    parts: int = 1


@dataclass(frozen=True)
class _Storage:
    number: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor; in the region `WORKSPACE` the index counts storages, to be given places."""

    region: Region
    index: int
    offset_bytes: int
    shape: Shape


class _NoPlanError(Exception):
    """The function is not a straight line of kernels."""


_ALLOC_STORAGE = Op.get("relax.memory.alloc_storage")
_ALLOC_TENSOR = Op.get("relax.memory.alloc_tensor")
_RESHAPE = Op.get("relax.reshape")

_Value: TypeAlias = "_Storage | _Tensor | tuple[_Value, ...]"


def plan_of(module: tvm.IRModule, *, slices: int = 1, parts: int = 1) -> Plan | None:
    """Return the plan of ``main``, or None where it has none.

    Parameters
    ----------
    module : IRModule
        Storage planned, tensors passed by destination (after ``LowerAllocTensor``).
    slices, parts : int
        As for `Plan`; the module is that of one slice.
    """
    try:
        return _Reader(module, slices=slices, parts=parts).read()
    except _NoPlanError:
        return None


class _Reader:
    def __init__(self, module: tvm.IRModule, *, slices: int, parts: int) -> None:
        self._module = module
        self._slices = slices
        self._parts = parts
        self._main = module["main"]
        self._values: dict[relax.Var, _Value] = {}
        self._storages: list[int] = []
        self._constants: list[GenericConst] = []
        self._calls: list[tuple[str, list[_Tensor]]] = []

    def read(self) -> Plan:
        for index, parameter in enumerate(self._main.params):
            self._values[parameter] = _Tensor(Region.INPUT, index, 0, _shape(parameter.ty))
        body = self._main.body
        if not isinstance(body, relax.SeqExpr):
            raise _NoPlanError
        for block in body.blocks:
            for binding in block.bindings:
                if not isinstance(binding, relax.VarBinding):
                    raise _NoPlanError
                self._bind(binding.var, binding.value)
        result = self._value(body.body)
        results = result if isinstance(result, tuple) else (result,)
        outputs = [tensor for tensor in results if isinstance(tensor, _Tensor)]
        if len(outputs) != len(results):
            raise _NoPlanError
        return self._place(outputs)

    def _bind(self, variable: relax.Var, value: relax.Expr) -> None:
        if isinstance(value, relax.Call):
            found = self._call(value)
            if found is not None:
                self._values[variable] = found
        else:
            self._values[variable] = self._value(value)

    def _call(self, call: relax.Call) -> _Value | None:
        if isinstance(call.op, GlobalVar):
            if not isinstance(self._module[call.op], tirx.PrimFunc):
                raise _NoPlanError
            self._calls.append((call.op.name_hint, [self._tensor(arg) for arg in call.args]))
            return None
        if call.op == _ALLOC_STORAGE:
            self._storages.append(math.prod(_integers(call.args[0].values)))
            return _Storage(len(self._storages) - 1)
        if call.op == _ALLOC_TENSOR:
            storage = self._value(call.args[0])
            if not isinstance(storage, _Storage):
                raise _NoPlanError
            (offset,) = _integers([call.args[1]])
            extents = tuple(_integers(call.args[2].values))
            shape = Shape(dtype=str(call.args[3].value), extents=extents)
            free = self._storages[storage.number] - offset - shape.size_bytes
            return _Tensor(Region.WORKSPACE, storage.number, offset + _half(free), shape)
        if call.op == _RESHAPE:
            tensor = self._tensor(call.args[0])
            return replace(tensor, shape=_shape(call.ty))
        raise _NoPlanError

    def _value(self, expression: relax.Expr) -> _Value:
        if isinstance(expression, relax.Var):
            if expression not in self._values:
                raise _NoPlanError
            return self._values[expression]
        if isinstance(expression, GenericConst):
            return self._constant(expression)
        if isinstance(expression, relax.Tuple):
            return tuple(self._value(field) for field in expression.fields)
        if isinstance(expression, relax.TupleGetItem):
            value = self._value(expression.tuple_value)
            if isinstance(value, tuple):
                return value[int(expression.index)]
        raise _NoPlanError

    def _tensor(self, expression: relax.Expr) -> _Tensor:
        value = self._value(expression)
        if not isinstance(value, _Tensor):
            raise _NoPlanError
        return value

    def _constant(self, constant: GenericConst) -> _Tensor:
        known = (i for i, other in enumerate(self._constants) if other.same_as(constant))
        index = next(known, len(self._constants))
        if index == len(self._constants):
            self._constants.append(constant)
        return _Tensor(Region.CONSTANT, index, 0, _shape(constant.ty))

    def _place(self, outputs: Sequence[_Tensor]) -> Plan:
        """Give outputs the caller's memory where they fill a storage, and the rest a workspace."""
        inputs = tuple(_shape(parameter.ty) for parameter in self._main.params)
        places: dict[int, Place] = {}
        given = {index: Place(region=Region.INPUT, index=index) for index in range(len(inputs))}
        copies: list[tuple[int, _Tensor]] = []
        for index, tensor in enumerate(outputs):
            whole = (
                tensor.region is Region.WORKSPACE
                and tensor.index not in places
                and tensor.shape.size_bytes == self._storages[tensor.index]
                and self._aligned(tensor.shape)
            )
            if whole:
                places[tensor.index] = Place(region=Region.OUTPUT, index=index)
            else:
                copies.append((index, tensor))
        workspace_bytes = 0

        def reserve(size_bytes: int) -> Place:
            nonlocal workspace_bytes
            place = Place(region=Region.WORKSPACE, offset_bytes=workspace_bytes)
            workspace_bytes += -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            return place

        for number, size in enumerate(self._storages):
            if number not in places:
                places[number] = reserve(size)
        loads = []
        for index, shape in enumerate(inputs):
            if not self._aligned(shape):
                target = reserve(shape.size_bytes)
                loads.append(Copy(target=target, source=given[index], size_bytes=shape.size_bytes))
                given[index] = target
        return Plan(
            inputs=inputs,
            outputs=tuple(tensor.shape for tensor in outputs),
            constants=tuple(self._constants),
            workspace_bytes=workspace_bytes,
            loads=tuple(loads),
            calls=tuple(
                KernelCall(
                    kernel=kernel,
                    places=tuple(_placed(tensor, places, given) for tensor in tensors),
                )
                for kernel, tensors in self._calls
            ),
            copies=tuple(
                Copy(
                    target=Place(region=Region.OUTPUT, index=index),
                    source=_placed(tensor, places, given),
                    size_bytes=tensor.shape.size_bytes,
                )
                for index, tensor in copies
            ),
            slices=self._slices,
            parts=self._parts,
        )

    def _aligned(self, shape: Shape) -> bool:
        """Say whether every slice of an input or output begins where kernels want it."""
        return self._slices == 1 or shape.size_bytes % ALIGNMENT_BYTES == 0


def _placed(tensor: _Tensor, storages: Mapping[int, Place], inputs: Mapping[int, Place]) -> Place:
    if tensor.region is Region.INPUT:
        return inputs[tensor.index]
    if tensor.region is not Region.WORKSPACE:
        return Place(region=tensor.region, index=tensor.index)
    storage = storages[tensor.index]
    return Place(
        region=storage.region,
        index=storage.index,
        offset_bytes=storage.offset_bytes + tensor.offset_bytes,
    )


def _half(free_bytes: int) -> int:
    """Return how far a tensor stands from the beginning of what its storage leaves free.

    In the middle: two threads that each take a half of the rows then write the same half of the
    storage in every kernel, and no line of it goes from core to core.
    """
    return free_bytes // 2 // ALIGNMENT_BYTES * ALIGNMENT_BYTES


def _integers(values: Sequence[object]) -> list[int]:
    return [_integer(value) for value in values]


def _integer(value: object) -> int:
    if isinstance(value, int):
        return value
    if isinstance(value, tirx.IntImm):
        return int(value.value)
    raise _NoPlanError


def _shape(ty: tvm.ir.Type) -> Shape:
    if not isinstance(ty, relax.TensorType) or not isinstance(ty.shape, relax.ShapeExpr):
        raise _NoPlanError
    return Shape(dtype=str(ty.dtype), extents=tuple(_integers(ty.shape.values)))
