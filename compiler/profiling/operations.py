"""How many operations a TIR function does on elements, before it is scheduled.

Counted is what is computed from loaded elements; indices and the conditions of a border are not. A
part that an expression writes several times is done once (LLVM does it once), so that an elementary
function counts the same wherever it stands: what its polynomial takes, which is about 30 for an
exponential, and `CALL_OPERATIONS` for a function that the C library computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import tvm
from tvm import tirx
from tvm.ir import Call
from tvm.ir.expr import TensorLoad
from tvm.s_tir import SBlock, SBlockRealize

from hone.targets.adder_intrinsics import SUM
from hone.targets.half_dot import BFLOAT16, PAIR, HalfDot
from hone.targets.half_intrinsics import add_name, pair_name

CALL_OPERATIONS: Final = 30
"""Of a function that TIR leaves to the C library: about as many as an exponential takes."""

_LIBRARY: Final = frozenset(
    (
        *("exp", "exp2", "exp10", "expm1", "log", "log2", "log10", "log1p", "pow", "sigmoid"),
        *("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh"),
        *("asinh", "acosh", "atanh", "erf", "hypot", "fmod"),
    )
)


def _short(name: str) -> str:
    return name.rpartition(".")[2]


_CHOICE: Final = "if_then_else"
# A sum by product stands beside the plain sum that other vectors take; one of them counts.
_FREE: Final = frozenset(("reinterpret", "likely", _short(SUM)))
_HALF_BITS: Final = 16
_PRODUCTS: Final = frozenset(_short(pair_name(dot)) for dot in HalfDot)
_SUMS: Final = frozenset(_short(add_name(dot)) for dot in HalfDot)
_BYTES: Final = ("int8", "uint8")


@dataclass(kw_only=True)
class Work:
    """Operations on elements.

    Parameters
    ----------
    by_dtype : dict of str to float
        What they work on → how many; ``int8`` where levels of 8 bits are read, ``bfloat16`` for
        products of pairs and their sums.
    products : float
        Multiplications among them.
    """

    by_dtype: dict[str, float] = field(default_factory=dict)
    products: float = 0.0

    @property
    def operations(self) -> float:
        """All of them."""
        return float(sum(self.by_dtype.values()))

    @property
    def dtype(self) -> str | None:
        """What most of them work on; None where there are none."""
        return max(self.by_dtype, key=lambda dtype: self.by_dtype[dtype], default=None)

    def add(self, other: Work, times: float = 1) -> None:
        """Add what is done so many times."""
        for dtype, count in other.by_dtype.items():
            self.by_dtype[dtype] = self.by_dtype.get(dtype, 0.0) + count * times
        self.products += other.products * times


def work_of(statement: tirx.Stmt) -> Work:
    """Return the operations of a statement and everything in it.

    Parameters
    ----------
    statement : Stmt
        Such as the body of a block. A loop whose length is not known counts once.
    """
    found = Work()
    if isinstance(statement, tirx.BufferStore | tirx.Bind | tirx.Evaluate):
        found.add(_Values().work(statement.value))
    elif isinstance(statement, tirx.SeqStmt):
        for part in statement.seq:
            found.add(work_of(part))
    elif isinstance(statement, tirx.For):
        extent = statement.extent
        found.add(work_of(statement.body), int(extent) if _is_constant(extent) else 1)
    elif isinstance(statement, tirx.IfThenElse):
        branches = [work_of(statement.then_case)]
        if statement.else_case is not None:
            branches.append(work_of(statement.else_case))
        found.add(max(branches, key=lambda branch: branch.operations))
    elif isinstance(statement, SBlockRealize):
        found.add(work_of(statement.block))
    elif hasattr(statement, "body") and statement.body is not None:
        found.add(work_of(statement.body))
    return found


def iterations(block: SBlock) -> int:
    """Return how often a block is done."""
    return math.prod(int(variable.dom.extent) for variable in block.iter_vars)


def _is_constant(extent: tirx.Expr) -> bool:
    return isinstance(extent, int | tirx.IntImm)


class _Values:
    """The values of one expression, each once: equal ones have the same number."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[object, ...], int] = {}
        self._seen: dict[int, int] = {}
        self._holds_element: list[bool] = []
        self._reads_bytes: list[bool] = []
        self._work = Work()
        self._of_indices: _Values | None = None

    def _indices(self) -> _Values:
        self._of_indices = self._of_indices or _Values()
        return self._of_indices

    def work(self, value: tirx.Expr) -> Work:
        """Return the operations that a value takes."""
        self._number(value)
        return self._work

    def _number(self, value: tirx.Expr) -> int:
        handle = value.__chandle__()
        if handle not in self._seen:
            # Indices only tell loads apart: they are told apart, and not counted, elsewhere.
            table = self._indices() if isinstance(value, TensorLoad) else self
            parts = [table._number(part) for part in _parts(value)]
            key = (type(value).__name__, str(value.ty), _identity(value), *parts)
            if key not in self._numbers:
                self._numbers[key] = len(self._holds_element)
                self._note(value, parts)
            self._seen[handle] = self._numbers[key]
        return self._seen[handle]

    def _note(self, value: tirx.Expr, parts: list[int]) -> None:
        """Remember a new value, and count it where it is computed from elements."""
        loads = isinstance(value, TensorLoad)
        element = loads or any(self._holds_element[part] for part in parts)
        if loads:
            of_bytes = _dtype(value) in _BYTES
        else:
            of_bytes = any(self._reads_bytes[part] for part in parts)
        self._holds_element.append(element)
        # A conversion to float ends the arithmetic on levels.
        self._reads_bytes.append(of_bytes and not _dtype(value).startswith("float"))
        if not element or loads:
            return
        chosen = isinstance(value, tirx.Select) or _name(value) == _CHOICE
        if chosen and not self._holds_element[parts[0]]:
            return  # a border, decided by indices
        count, products = _operations(value)
        if count:
            dtype = _works_on(value, levels=of_bytes)
            self._work.add(Work(by_dtype={dtype: float(count)}, products=float(products)))


def _works_on(value: tirx.Expr, *, levels: bool) -> str:
    if _name(value) in _PRODUCTS | _SUMS:
        return BFLOAT16
    operand = next(_parts(value), value)
    dtype = _dtype(value if _dtype(value) != "bool" else operand)
    return "int8" if levels and dtype.startswith(("int", "uint")) else dtype


def _operations(value: tirx.Expr) -> tuple[int, int]:
    """Return how many operations one node is, and how many of them multiply."""
    name = _name(value)
    if name in _PRODUCTS:
        return 2 * PAIR - 1, PAIR
    if name in _LIBRARY:
        return CALL_OPERATIONS, 0
    if name == "fma":
        return 2, 1
    if name in _FREE or _moves_bits(value):
        return 0, 0
    if isinstance(value, tirx.Cast | tirx.Broadcast | tirx.Ramp | tirx.Let | TensorLoad):
        return 0, 0
    return 1, int(isinstance(value, tirx.Mul))


def _moves_bits(value: tirx.Expr) -> bool:
    """Say whether a node only puts 16 bits into the upper half of a word, beside others or not.

    Two values of 16 bits become a word so, one load where they lie side by side.
    """
    if isinstance(value, tirx.BitwiseOr):
        return _moves_bits(value.a) or _moves_bits(value.b)
    return (
        isinstance(value, tirx.LShift)
        and isinstance(value.a, tirx.Cast)
        and _dtype(value.a.value) == f"uint{_HALF_BITS}"
        and _identity(value.b) == _HALF_BITS
    )


def _name(value: tirx.Expr) -> str:
    """Return the operator of a call without its dialect, else nothing."""
    if isinstance(value, Call) and isinstance(value.op, tvm.ir.Op):
        return _short(str(value.op.name))
    return ""


def _dtype(value: tirx.Expr) -> str:
    return str(value.ty.dtype)


def _identity(value: tirx.Expr) -> object:
    """Return what tells a node from others with the same parts."""
    if isinstance(value, tirx.IntImm | tirx.FloatImm | tvm.ir.StringImm):
        return value.value
    if isinstance(value, TensorLoad):
        return value.source.__chandle__()
    if isinstance(value, Call):
        return value.op.__chandle__()
    return value.__chandle__() if isinstance(value, tirx.Var) else None


def _parts(value: tirx.Expr) -> Iterator[tirx.Expr]:
    """Yield what a value is computed from."""
    if isinstance(value, TensorLoad):
        yield from value.indices
    elif isinstance(value, Call):
        yield from value.args
    elif isinstance(value, tirx.Select):
        yield from (value.condition, value.true_value, value.false_value)
    elif isinstance(value, tirx.Cast | tirx.Broadcast):
        yield value.value
    elif isinstance(value, tirx.Let):
        yield from (value.value, value.body)
    elif isinstance(value, tirx.Ramp):
        yield from (value.base, value.stride)
    elif isinstance(value, tirx.Not):
        yield value.a
    elif hasattr(value, "a") and hasattr(value, "b"):
        yield from (value.a, value.b)
