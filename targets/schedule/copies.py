"""Writes concatenations, padding and other choices by index as one plain copy for each choice.

Loops of a copy that run through memory as one are one loop, whose ends are constants: LLVM makes
vectors of it, the remainder included. Axes that all copies share are the tasks, so that a row of a
concatenation is written at once; without such axes each copy is cut into tasks by itself, all in
one parallel region.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import s_tir, tirx
from tvm.s_tir.schedule import SBlockRV

from .blocks import (
    MIN_PARALLEL_CYCLES,
    DoesNotFitError,
    cycles,
    extents,
    inline_elementwise,
    is_reduction,
    leaves,
)
from .boxes import (
    Box,
    Domain,
    analyzer_of,
    boxes_of,
    depends_beside_loads,
    loads_of,
    strides_of,
    substituted,
    undivided,
)
from .machine import Machine

# Tasks for each thread where copies are cut: a late thread leaves some of them to the others.
TASKS_PER_THREAD = 2
# A task holds rows of at least so many elements: a loop for vectors.
LEAST_ROW = 32
# A part of a loop is a multiple of this, so that parts begin at cache lines where copies do.
PART = 64


def write_copies(func: tirx.PrimFunc, machine: Machine) -> tirx.PrimFunc | None:
    """Return a function as plain copies, its loops written out.

    Parameters
    ----------
    func : PrimFunc
        Not scheduled, and for no template.
    machine : Machine
        Threads and lanes.

    Returns
    -------
    PrimFunc or None
        None where the function chooses nothing by index, or does more than that.
    """
    schedule = s_tir.Schedule(func)
    if any(is_reduction(schedule, block) for block in leaves(schedule)):
        return None
    inline_elementwise(schedule, pinned=lambda _: False)
    nests, chooses = [], False
    for block in leaves(schedule):
        domain = _domain(schedule, block)
        if domain is None:
            return None
        boxes = boxes_of(domain)
        if boxes is None or any(_is_transposed(box, domain) for box in boxes):
            return None
        chooses = chooses or len(boxes) > 1
        buffer = schedule.get(block).body.buffer
        try:
            work = cycles(schedule, block, machine.lanes)
        except DoesNotFitError:
            return None
        nests.append(_Nest(buffer=buffer, domain=domain, boxes=tuple(boxes), work=work))
    if not chooses:
        return None
    body = tirx.stmt_seq(*[nest.written(machine) for nest in nests])
    root = schedule.mod["main"].body.block
    block = s_tir.SBlock([], [], [], "root", body, alloc_buffers=root.alloc_buffers)
    return schedule.mod["main"].with_body(s_tir.SBlockRealize([], True, block))


def _domain(schedule: s_tir.Schedule, block: SBlockRV) -> Domain | None:
    """Return the iterations of a block that stores each element once, in the order of memory."""
    statement = schedule.get(block)
    store = statement.body
    if not isinstance(store, tirx.BufferStore):
        return None
    variables = [axis.var for axis in statement.iter_vars]
    in_order = len(variables) == len(store.indices) and all(
        index.same_as(variable) for index, variable in zip(store.indices, variables, strict=True)
    )
    if not in_order or len({str(variable.ty) for variable in variables}) != 1:
        return None
    return undivided(
        Domain(
            variables=tuple(variables),
            extents=tuple(extents(schedule, block)),
            indices=tuple(store.indices),
            value=store.value,
        )
    )


def _is_transposed(box: Box, domain: Domain) -> bool:
    """Tell whether a box reads along another axis than it writes: that goes in tiles."""
    for load in loads_of(box.value):
        strides = strides_of(load.source, load.indices, domain.variables)
        if strides is None:
            continue
        moved = [s for s, extent in zip(strides, box.extents, strict=True) if extent > 1]
        if moved and moved[-1] not in (0, 1) and 1 in moved:
            return True
    return False


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """Axes of a box that are one loop."""

    axes: tuple[int, ...]
    extent: int


@dataclass(frozen=True, kw_only=True)
class _Nest:
    """The copies of one block."""

    buffer: tirx.Buffer
    domain: Domain
    boxes: tuple[Box, ...]
    work: int

    @property
    def dtype(self) -> str:
        """Type of indices."""
        return str(self.domain.variables[0].ty)

    def written(self, machine: Machine) -> tirx.Stmt:
        """Return the statement that does all copies."""
        shared = self._shared()
        while shared and math.prod(self.domain.extents[shared:]) < LEAST_ROW:
            shared -= 1
        rows = math.prod(self.domain.extents[:shared])
        parallel = self.work >= MIN_PARALLEL_CYCLES
        if rows < machine.threads * TASKS_PER_THREAD:
            shared, rows = 0, 1
        if shared:
            row = tirx.Var("row", self.dtype)
            simplify = analyzer_of([row], ((0, rows),)).simplify
            outer = [simplify(i) for i in _unfused(row, self.domain.extents[:shared])]
            body = tirx.stmt_seq(*[self._copies(group, outer) for group in self._groups()])
            return _loop(row, rows, body, parallel=parallel)
        if not parallel:
            return tirx.stmt_seq(*[self._copies(group, ()) for group in self._groups()])
        tasks = machine.threads * TASKS_PER_THREAD
        task = tirx.Var("task", self.dtype)
        parts = [self._copies(group, (), task=task, tasks=tasks) for group in self._groups()]
        return _loop(task, tasks, tirx.stmt_seq(*parts), parallel=True)

    def _shared(self) -> int:
        """Return how many leading axes all boxes have as a whole."""
        for axis, extent in enumerate(self.domain.extents):
            if any(box.extents[axis] != extent for box in self.boxes):
                return axis
        return 0

    def _groups(self) -> list[list[Box]]:
        """Return the boxes, those together that lie between each other: they share cache lines."""
        groups: list[list[Box]] = []
        for box in self.boxes:
            last = groups[-1][-1] if groups else None
            if last is not None and box.extents == last.extents and box.extents[-1] == 1:
                groups[-1].append(box)
            else:
                groups.append([box])
        return groups

    def _copies(
        self,
        group: Sequence[Box],
        outer: Sequence[tirx.Expr],
        *,
        task: tirx.Var | None = None,
        tasks: int = 1,
    ) -> tirx.Stmt:
        """Return the loops of boxes of one shape, one store for each box inside.

        Parameters
        ----------
        group : sequence of Box
            Of equal extents.
        outer : sequence of Expr
            Values of the leading axes.
        task : Var, optional
            Which part of the longest loop is written.
        tasks : int
            How many parts there are.
        """
        loops = self._loops(group, len(outer))
        variables = [tirx.Var(f"i{number}", self.dtype) for number in range(len(loops))]
        stores = [self._store(box, outer, loops, variables) for box in group]
        statement = tirx.stmt_seq(*stores)
        longest = max(range(len(loops)), key=lambda i: loops[i].extent, default=None)
        for number in reversed(range(len(loops))):
            extent = loops[number].extent
            if task is None or number != longest:
                statement = _loop(variables[number], extent, statement)
                continue
            part = -(-extent // tasks)
            if part >= PART:
                part = -(-part // PART) * PART
            first = task * part
            size = tirx.max(tirx.min(extent - first, part), 0)
            shifted = tirx.Var(f"p{number}", self.dtype)
            statement = _substituted(statement, variables[number], first + shifted)
            statement = tirx.For(shifted, 0, size, tirx.ForKind.SERIAL, statement)
        if task is not None and longest is None:
            return tirx.IfThenElse(task == 0, statement, None)
        return statement

    def _loops(self, group: Sequence[Box], outer: int) -> list[_Loop]:
        """Return the loops of a box inside its leading axes, outermost first."""
        extents = group[0].extents
        variables = self.domain.variables
        accesses = [strides_of(self.buffer, self.domain.indices, variables)]
        simple = True
        for box in group:
            simple = simple and not depends_beside_loads(box.value, variables)
            for load in loads_of(box.value):
                accesses.append(strides_of(load.source, load.indices, variables))
        loops: list[_Loop] = []
        for axis in reversed(range(outer, len(extents))):
            if extents[axis] == 1:
                continue
            if loops and simple and self._continues(accesses, axis, loops[-1]):
                last = loops.pop()
                loops.append(_Loop(axes=(axis, *last.axes), extent=extents[axis] * last.extent))
            else:
                loops.append(_Loop(axes=(axis,), extent=extents[axis]))
        return loops[::-1]

    @staticmethod
    def _continues(accesses: Sequence[list[int] | None], axis: int, loop: _Loop) -> bool:
        return all(
            strides is not None and strides[axis] == strides[loop.axes[-1]] * loop.extent
            for strides in accesses
        )

    def _store(
        self,
        box: Box,
        outer: Sequence[tirx.Expr],
        loops: Sequence[_Loop],
        variables: Sequence[tirx.Var],
    ) -> tirx.Stmt:
        values: list[tirx.Expr] = [tirx.const(first, self.dtype) for first, _ in box.ranges]
        values[: len(outer)] = outer
        for loop, variable in zip(loops, variables, strict=True):
            sizes = [box.extents[axis] for axis in loop.axes]
            for axis, value in zip(loop.axes, _unfused(variable, sizes), strict=True):
                values[axis] = value + box.ranges[axis][0]
        own = self.domain.variables
        analyzer = analyzer_of(variables, tuple((0, loop.extent) for loop in loops))
        indices = [
            analyzer.simplify(substituted(index, own, values)) for index in self.domain.indices
        ]
        value = analyzer.simplify(substituted(box.value, own, values))
        return tirx.BufferStore(self.buffer, value, indices)


def _substituted(statement: tirx.Stmt, variable: tirx.Var, value: tirx.Expr) -> tirx.Stmt:
    return substituted(statement, [variable], [value])


def _unfused(index: tirx.Expr, sizes: Sequence[int]) -> list[tirx.Expr]:
    """Return the indices of axes from that of the loop that they are together."""
    indices: list[tirx.Expr] = []
    for size in reversed(sizes[1:]):
        indices.append(tirx.floormod(index, size))
        index = tirx.floordiv(index, size)
    return [index, *reversed(indices)] if sizes else []


def _loop(variable: tirx.Var, extent: int, body: tirx.Stmt, *, parallel: bool = False) -> tirx.Stmt:
    kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
    return tirx.For(variable, 0, extent, kind, body)
