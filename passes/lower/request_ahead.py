"""Lets kernels request what a later kernel reads first, while they compute.

Rewrites raw kernels (`RawKernels`): each turn of the loop of sums in which a kernel spends its time
requests one line. The kernel gets two parameters more, an address and a step in bytes: turn number
``t`` of all turns of all tasks requests the line at ``address + t * step``. So a caller chooses
anew in each call what is requested, and a step of 0 asks for one line that is there already. Tasks
count one behind the other: the thread with the first half of them requests the first half.

Runs on scheduled raw functions, before TVM's lowering. Numerics: exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import tvm
from tvm import s_tir, tirx
from tvm.ir import PointerType, PrimType
from tvm_ffi import structural_map, structural_walk

from .prefetch_weights import request

# Locality of LLVM's intrinsic: into the second level.
SECOND_LEVEL = 2
# Elements of the bytes that an address points to: as many as an index may name.
BYTES = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class Turns:
    """The loop of a kernel in which it spends its time.

    Parameters
    ----------
    number : int
        Turns of all tasks.
    operations : int
        Multiply-adds of each turn, or additions where its products are of sums.
    steps : int
        Turns of the innermost loop.
    """

    number: int
    operations: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class _Nest:
    """A loop of sums and the loops around it, the outermost first, it being the last."""

    loops: tuple[tirx.For, ...]
    operations: int

    @property
    def turns(self) -> int:
        return math.prod(int(loop.extent) for loop in self.loops)


def _is_sum(block: s_tir.SBlock) -> bool:
    reduces = any(int(axis.iter_type) == tirx.IterVar.CommReduce for axis in block.iter_vars)
    return reduces and block.init is None and isinstance(block.body, tirx.BufferStore)


def _nests(statement: tirx.Stmt, loops: tuple[tirx.For, ...]) -> list[_Nest]:
    """Return the loops of sums inside a statement."""
    if isinstance(statement, tirx.SeqStmt):
        return [nest for part in statement.seq for nest in _nests(part, loops)]
    if isinstance(statement, tirx.For):
        if not isinstance(statement.extent, tirx.IntImm):
            return []
        return _nests(statement.body, (*loops, statement))
    if not isinstance(statement, s_tir.SBlockRealize):
        return []
    if statement.block.name_hint == "root":
        return _nests(statement.block.body, loops)
    if not _is_sum(statement.block):
        return []
    serial = [i for i, loop in enumerate(loops) if loop.kind == tirx.ForKind.SERIAL]
    if not serial or not any(loop.kind == tirx.ForKind.PARALLEL for loop in loops):
        return []
    inside = math.prod(int(loop.extent) for loop in loops[serial[-1] + 1 :])
    operations = inside * max(_additions(statement.block.body) - 1, 1)
    return [_Nest(loops=loops[: serial[-1] + 1], operations=operations)]


def _additions(statement: tirx.Stmt) -> int:
    found: list[tirx.Add] = []
    structural_walk(statement.value, ((tirx.Add, found.append),))
    return len(found)


def _root(func: tirx.PrimFunc) -> tirx.Stmt | None:
    found: list[s_tir.SBlockRealize] = []

    def note(realize: s_tir.SBlockRealize) -> None:
        if realize.block.name_hint == "root":
            found.append(realize)

    structural_walk(func.body, ((s_tir.SBlockRealize, note),))
    return found[0] if found else None


def _hottest(func: tirx.PrimFunc) -> _Nest | None:
    root = _root(func)
    nests = [] if root is None else _nests(root, ())
    return max(nests, key=lambda nest: nest.turns * nest.operations, default=None)


def turns_of(func: tirx.PrimFunc) -> Turns | None:
    """Return the turns of a scheduled function's loop of sums; None without one in parallel."""
    nest = _hottest(func)
    if nest is None:
        return None
    steps = int(nest.loops[-1].extent)
    return Turns(number=nest.turns, operations=nest.operations, steps=steps)


def _rewrite(func: tirx.PrimFunc) -> tirx.PrimFunc:
    nest = _hottest(func)
    if nest is None:
        raise ValueError("a kernel with a parallel loop of sums is required")
    pointer = tirx.Var("ahead", PointerType(PrimType("uint8")))
    step = tirx.Var("ahead_step", "int64")
    lines = tirx.decl_buffer((BYTES,), "uint8", data=pointer, name="ahead_lines")
    turn: tirx.Expr = tirx.const(0, "int64")
    for loop in nest.loops:
        turn = turn * int(loop.extent) + tirx.Cast("int64", loop.loop_var)
    ask = request(lines, [turn * step], SECOND_LEVEL)

    def fetch(loop: tirx.For) -> tirx.For:
        if not loop.loop_var.same_as(nest.loops[-1].loop_var):
            return loop
        return tirx.For(
            loop.loop_var,
            loop.min,
            loop.extent,
            loop.kind,
            tirx.SeqStmt([loop.body, ask]),
            loop.thread_binding,
            loop.annotations,
        )

    body = structural_map(func.body, (tirx.For, fetch))
    return tirx.PrimFunc(
        [*func.params, pointer, step],
        tirx.SeqStmt([tirx.DeclBuffer(lines, data=pointer), body]),
        ret_type=func.ret_type,
        attrs=func.attrs,
    )


@tvm.transform.module_pass(opt_level=0)
class RequestAhead:
    """Give kernels of some names two parameters more, and requests.

    Parameters
    ----------
    kernels : iterable of str
        Names; each has `turns_of`.
    """

    def __init__(self, kernels: Iterable[str]) -> None:
        self._kernels = frozenset(kernels)

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with such kernels; the same one where there is none."""
        if not self._kernels:
            return module
        functions = {
            variable: _rewrite(func) if variable.name_hint in self._kernels else func
            for variable, func in module.functions.items()
        }
        return tvm.IRModule(functions, attrs=module.attrs)
