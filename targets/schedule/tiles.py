"""Schedules of convolutions and matrix products whose products are AMX tiles.

The stages are those of `hone.passes.lower.tile_sums`: ``tile_copy`` (optional), ``tile_left``,
``tile_acc``, ``tile_sums`` and an epilogue. Pixels and filters are cut into blocks whose sums fit
the tiles; a block is stored to a small buffer, from which the epilogue stores the result.
"""

from __future__ import annotations

import math

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

from hone.targets.tile_intrinsics import CONFIGURE, SCOPE, require
from hone.targets.tile_product import FORMS, GROUP_BYTES, LANES, TileProduct, TileShape

from .blocks import (
    MIN_PARALLEL_CYCLES,
    DoesNotFitError,
    extents,
    leaves,
    name_of,
    output_block,
    parallelize,
    read_shape,
    vector_length,
)
from .machine import Machine, choose_tasks
from .tile_plan import COPY_BYTES_PER_CYCLE, PRODUCT_CYCLES

TILE_PRODUCT, TILE_ROWS, LEFT_TILES = "hone_product", "hone_rows", "hone_left_tiles"
"""Attributes of the block of sums, which the shapes of buffers do not tell."""


def _shape(schedule: s_tir.Schedule, sums: SBlockRV) -> TileShape:
    """Return the tiles that a kernel was written for."""
    notes = schedule.get(sums).annotations
    *_, right_tiles, groups, _, _ = read_shape(schedule, sums, 1)
    return TileShape(
        product=TileProduct(str(notes[TILE_PRODUCT])),
        rows=int(notes[TILE_ROWS]),
        groups=groups,
        left_tiles=int(notes[LEFT_TILES]),
        right_tiles=right_tiles,
    )


def element_bytes(shape: TileShape) -> int:
    """Return the bytes of an element of either operand."""
    return GROUP_BYTES // FORMS[shape.product].group


def register_intrinsics(module: tvm.IRModule) -> None:
    """Register the intrinsics that records of a kernel's schedules name.

    A process that replays a record has not necessarily lowered or scheduled its kernel, which is
    when they are registered else.

    Parameters
    ----------
    module : IRModule
        With one function, ``main``, not scheduled.
    """
    if not isinstance(module["main"].body, s_tir.SBlockRealize):
        return
    schedule = s_tir.Schedule(module)
    for block in leaves(schedule):
        if TILE_PRODUCT in schedule.get(block).annotations:
            require(_shape(schedule, block))


def _flatten(schedule: s_tir.Schedule, output: SBlockRV, sums: list[int]) -> None:
    """Give the epilogue the three axes of the sums: images, pixels and filters."""
    images = sums[0]
    shape = extents(schedule, output)
    first = 1 if images > 1 and len(shape) > 1 and shape[0] == images else 0

    def flat(*index: tirx.Var) -> tuple[tirx.Expr, ...]:
        pixel = zero = tirx.const(0, "int32")
        for extent, at in zip(shape[first:-1], index[first:-1], strict=True):
            pixel = pixel * extent + at
        return (index[0] if first else zero, pixel, index[-1])

    schedule.transform_block_layout(output, tirx.IndexMap.from_func(flat, ndim=len(shape)))


def _tasks(
    schedule: s_tir.Schedule, machine: Machine, anchor: SBlockRV, shape: TileShape
) -> tuple[int, int]:
    """Return how many parts the blocks of pixels and those of filters are cut into."""
    images, rows, lanes, *_ = extents(schedule, anchor)
    size = element_bytes(shape)
    bytes_of_left = math.prod(read_shape(schedule, anchor, 0)) * size
    blocks = rows // shape.block_rows
    return choose_tasks(
        machine,
        batch=images,
        row_tiles=blocks,
        channel_tiles=lanes // shape.block_lanes,
        weight_bytes=math.prod(read_shape(schedule, anchor, 1)) * size,
        input_bytes=bytes_of_left,
        row_bytes=bytes_of_left // (images * blocks),
    )


def _place_copy(
    schedule: s_tir.Schedule,
    machine: Machine,
    copy: SBlockRV,
    tasks: LoopRV,
    *,
    task_rows: int,
    size: int,
) -> None:
    """Copy what a task reads within it, or everything beforehand, whichever moves less.

    A task also reads the rows of taps below its own pixels, and tasks of the same pixels and other
    filters copy the same. ``size`` is that of an element, in bytes.
    """
    images, phases, rows, run = extents(schedule, copy)
    count = int(schedule.get(tasks).extent)
    halo = rows * images / max(count, 1) if count <= images else rows - task_rows
    within = count * phases * min(task_rows + max(halo, 0), rows) * run * size
    whole = images * phases * rows * run * size
    start = MIN_PARALLEL_CYCLES * COPY_BYTES_PER_CYCLE
    if within / machine.threads <= whole / machine.threads + start:
        schedule.compute_at(copy, tasks, preserve_unit_loops=True)
        return
    image, phase, row, _ = schedule.get_loops(copy)
    schedule.parallel(schedule.fuse(image, phase, row))


def _tensorize(
    schedule: s_tir.Schedule, block: SBlockRV, name: str, *, tile: tuple[int, ...]
) -> None:
    """Cut the innermost loops of a copy into tiles, each one instruction, and unroll the rest."""
    loops = schedule.get_loops(block)[-len(tile) :]
    pairs = [schedule.split(loop, [None, extent]) for loop, extent in zip(loops, tile, strict=True)]
    outer, inner = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    schedule.reorder(*outer, *inner)
    for loop in outer:
        schedule.unroll(loop)
    schedule.tensorize(inner[0], name)


def _finish(
    schedule: s_tir.Schedule, machine: Machine, output: SBlockRV, *, filters: int, lanes: int
) -> None:
    """Vectorize the epilogue along the filters; a vector that the last filter cuts is scalar."""
    loops = schedule.get_loops(output)
    length = vector_length(lanes if filters % lanes == 0 else filters, machine.lanes)
    if length > 1:
        outer, inner = schedule.split(loops[-1], [None, length])
        schedule.vectorize(inner)
        schedule.unroll(outer)


def schedule_tiles(schedule: s_tir.Schedule, machine: Machine, blocks: list[SBlockRV]) -> None:
    """Schedule a convolution or matrix product in tiles.

    Parameters
    ----------
    schedule : Schedule
        Changed in place.
    machine : Machine
        Decides tasks.
    blocks : list of SBlockRV
        All blocks of the function in order.

    Raises
    ------
    DoesNotFitError
        The sums have no epilogue.
    """
    by_name = {name_of(schedule, block): block for block in blocks}

    def find(prefix: str) -> SBlockRV | None:
        return next((b for name, b in by_name.items() if name.startswith(prefix)), None)

    copy, left = find("tile_copy"), find("tile_left")
    anchor, sums = find("tile_acc"), find("tile_sums")
    if left is None or anchor is None or sums is None or blocks[-1] is sums:
        raise DoesNotFitError("the stages of a product of tiles are not complete")
    shape = _shape(schedule, anchor)
    names = require(shape)
    output = output_block(schedule, sums, blocks)
    filters = extents(schedule, output)[-1]
    _flatten(schedule, output, extents(schedule, anchor))
    row_parts, filter_parts = _tasks(schedule, machine, anchor, shape)
    weight_bytes = math.prod(read_shape(schedule, anchor, 1))
    input_bytes = math.prod(read_shape(schedule, anchor, 0))

    right = schedule.cache_read(anchor, 1, SCOPE)
    schedule.set_scope(left, 0, SCOPE)
    schedule.set_scope(anchor, 0, SCOPE)
    image, m, k, tap, step, group, element = schedule.get_loops(anchor)
    pixels = int(schedule.get(m).extent)
    m_part, m_block, m_tile, m_row = schedule.split(
        m, [row_parts, None, shape.left_tiles, shape.rows]
    )
    k_part, k_block, k_tile, k_lane = schedule.split(
        k, [filter_parts, None, shape.right_tiles, LANES]
    )
    order = (image, k_part, m_part) if weight_bytes > input_bytes else (image, m_part, k_part)
    inside = machine.pick("inner", {"rows": (k_block, m_block), "weights": (m_block, k_block)})
    schedule.reorder(*order, *inside, tap, step, m_tile, k_tile, m_row, k_lane, group, element)
    tasks = schedule.fuse(*order)
    schedule.compute_at(left, step, preserve_unit_loops=True)
    if copy is not None:
        _place_copy(
            schedule,
            machine,
            copy,
            tasks,
            task_rows=pixels // row_parts,
            size=element_bytes(shape),
        )
    schedule.compute_at(right, step, preserve_unit_loops=True)
    schedule.reverse_compute_at(sums, inside[1], preserve_unit_loops=True)
    schedule.reverse_compute_at(output, inside[1], preserve_unit_loops=True)
    elements = FORMS[shape.product].group
    products = math.prod(extents(schedule, anchor)) // (LANES**3 * elements)
    work = products * PRODUCT_CYCLES
    parallelize(schedule, tasks, work=work, least=MIN_PARALLEL_CYCLES)

    cleared = schedule.decompose_reduction(anchor, tap)
    for loop in (*schedule.get_loops(cleared)[-4:-2], m_tile, k_tile):
        schedule.unroll(loop)
    schedule.tensorize(schedule.get_loops(cleared)[-2], names.clear)
    schedule.tensorize(m_row, names.multiply)
    load_left = names.load_stored if copy is None else names.load_left
    _tensorize(schedule, left, load_left, tile=(shape.rows, shape.depth))
    schedule.unroll(schedule.get_loops(right)[-4])
    _tensorize(schedule, right, names.load_right, tile=(shape.groups, LANES, elements))
    _tensorize(schedule, sums, names.store, tile=(shape.rows, LANES))
    _finish(schedule, machine, output, filters=filters, lanes=shape.block_lanes)
    schedule.annotate(tasks, CONFIGURE, [shape.rows, shape.groups, shape.left_tiles])
