"""What a kernel does, read off its TIR before it is scheduled: operations, and bytes it touches."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import tvm
from tvm import relax, s_tir, tirx
from tvm.s_tir import SBlock

from hone.importing.layer_names import PART
from hone.model import Model
from hone.passes.lower.fuse_operators import kernel_layers
from hone.targets.half_dot import BFLOAT16
from hone.targets.schedule.tiles import TILE_PRODUCT
from hone.targets.tile_product import TileProduct

from .layer_costs import layer_costs
from .operations import Work, iterations, work_of

# Blocks of multiply-adds over output tiles that are rounded up; see `hone.targets.schedule.cpu`.
ROUNDED_BLOCKS = (
    *("conv_acc", "mm_acc", "mmrow_acc", "bmm_acc", "qconv_acc", "qmm_acc"),
    *("tile_acc", "matrix_acc"),
)
# What products of tiles work on; widening their bits is no operation, the instruction does it.
_TILE_DTYPES = {TileProduct.TDPBUSD: "int8", TileProduct.TDPBF16PS: BFLOAT16}


@dataclass(frozen=True, kw_only=True)
class KernelCost:
    """The work of one call of a kernel.

    Parameters
    ----------
    operations : float
        Additions, multiplications, comparisons and the like on elements, see
        `hone.profiling.operations`: a multiply-add is two. What is computed only to round a tile up
        does not count.
    touched_bytes : tuple of int
        For each argument the bytes that are read or written at most: all of it, or fewer where a
        gather reads a few rows of a table.
    dtype : str or None
        What most of the operations work on; None where there are none.
    """

    operations: float
    touched_bytes: tuple[int, ...]
    dtype: str | None = None


def kernel_costs(lowered: tvm.IRModule, model: Model) -> dict[str, KernelCost]:
    """Return the cost of every kernel of a lowered module.

    Parameters
    ----------
    lowered : IRModule
        From `hone.pipeline.lower`.
    model : Model
        What it was lowered from: its layers say how much of a rounded tile is useful.
    """
    macs = {
        layer.binding: cost.macs
        for layer, cost in zip(model.layers, layer_costs(model), strict=True)
    }
    useful = {
        kernel: sum(macs.get(name, 0) for name in {name.split(PART)[0] for name in names})
        for kernel, names in kernel_layers(lowered).items()
    }
    calls = _calls(lowered)
    return {
        variable.name_hint: _cost(
            func, most_macs=useful.get(variable.name_hint, 0) // calls.get(variable.name_hint, 1)
        )
        for variable, func in lowered.functions.items()
        if isinstance(func, tirx.PrimFunc)
    }


def _calls(lowered: tvm.IRModule) -> Counter[str]:
    """Return how often ``main`` calls each kernel."""
    return Counter(
        str(binding.value.args[0].name_hint)
        for block in lowered["main"].body.blocks
        for binding in block.bindings
        if isinstance(binding.value, relax.Call)
        and len(binding.value.args)
        and isinstance(binding.value.args[0], tvm.ir.GlobalVar)
    )


def _cost(func: tirx.PrimFunc, *, most_macs: int) -> KernelCost:
    """Count one function.

    Parameters
    ----------
    func : PrimFunc
        Not scheduled.
    most_macs : int
        Multiply-adds of its layers, which the rounded tile may exceed; 0 where none are known.
    """
    if not isinstance(func.body, s_tir.SBlockRealize) or func.body.block.name_hint != "root":
        # Loops that TVM wrote out, such as scans and sorts: only the arguments are known.
        tensors = [parameter for parameter in func.params if _is_tensor(parameter)]
        whole = tuple(_elements(tensor) * _itemsize(tensor) for tensor in tensors)
        return KernelCost(operations=0, touched_bytes=whole, dtype=Work().dtype)
    schedule = s_tir.Schedule(tvm.IRModule({"main": func}))
    func = schedule.mod["main"]
    blocks = [
        schedule.get(block) for block in schedule.get_child_blocks(schedule.get_sblock("root"))
    ]
    total = Work()
    for block in blocks:
        work, done = _work_of(block), iterations(block)
        if str(block.name_hint).startswith(ROUNDED_BLOCKS):
            useful = _share_read(block, blocks)
            if most_macs and work.products:
                useful = min(useful, most_macs / (work.products * done))
            total.add(work, done * useful)
        else:
            total.add(work, done)
    return KernelCost(
        operations=total.operations,
        touched_bytes=tuple(
            _touched(parameter, blocks) for parameter in func.params if _is_tensor(parameter)
        ),
        dtype=total.dtype,
    )


def _work_of(block: SBlock) -> Work:
    """Return the operations of one iteration of a block."""
    product = block.annotations.get(TILE_PRODUCT)
    if product is None:
        return work_of(block.body)
    return Work(by_dtype={_TILE_DTYPES[TileProduct(str(product))]: 2.0}, products=1.0)


def _itemsize(buffer: tirx.Buffer) -> int:
    return int(tvm.runtime.DataType(str(buffer.dtype)).itemsize)


def _elements(buffer: tirx.Buffer) -> int:
    return math.prod(int(extent) for extent in buffer.shape)


def _share_read(block: SBlock, blocks: list[SBlock]) -> float:
    """Return how much of a block's result is read by the next one: less than all where it cuts."""
    result = block.writes[0].source
    readers = [
        iterations(other)
        for other in blocks
        if any(region.source.same_as(result) for region in other.reads) and not other.same_as(block)
    ]
    return min(1.0, max(readers) / _elements(result)) if readers else 1.0


def _is_tensor(parameter: tirx.Var) -> bool:
    return hasattr(parameter.ty, "shape")


def _touched(parameter: tirx.Buffer, blocks: list[SBlock]) -> int:
    """Return the bytes of an argument that a kernel can touch with the iterations that it has."""
    accesses = sum(
        iterations(block)
        for block in blocks
        for region in (*block.reads, *block.writes)
        if region.source.same_as(parameter)
    )
    return min(_elements(parameter), accesses) * _itemsize(parameter)
