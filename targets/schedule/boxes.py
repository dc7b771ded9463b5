"""Divides the iterations of an elementwise block into boxes within which no condition is left.

A concatenation chooses its operand by the index of an axis, padding by the distance from a border:
inside a box every such choice is made, and what is left is a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm import sym, tirx
from tvm.ir.expr import TensorLoad
from tvm_ffi import structural_map, structural_walk

# More boxes than this are more code than they are worth.
MOST_BOXES = 24
# An axis that a condition mixes with another one is taken apart where it is so short.
MOST_ENUMERATED = 8

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Box:
    """Some iterations of a block, and what is stored there.

    Parameters
    ----------
    ranges : tuple of (int, int)
        First and end of each axis.
    value : tirx.Expr
        In terms of the axes' variables.
    """

    ranges: Ranges
    value: tirx.Expr

    @property
    def extents(self) -> tuple[int, ...]:
        """Iterations along each axis."""
        return tuple(end - first for first, end in self.ranges)


@dataclass(frozen=True, kw_only=True)
class Domain:
    """The iterations of an elementwise block.

    Parameters
    ----------
    variables : tuple of Var
        Of the axes.
    extents : tuple of int
        Of the axes.
    indices : tuple of Expr
        Where the block stores.
    value : tirx.Expr
        What it stores.
    """

    variables: tuple[tirx.Var, ...]
    extents: tuple[int, ...]
    indices: tuple[tirx.Expr, ...]
    value: tirx.Expr


def substituted(
    expression: tirx.Expr, variables: Sequence[tirx.Var], values: Sequence[tirx.Expr]
) -> tirx.Expr:
    """Return an expression with values for variables."""

    def new(variable: tirx.Var) -> tirx.Expr:
        for old, value in zip(variables, values, strict=True):
            if variable.same_as(old):
                return value
        return variable

    return structural_map(expression, (tirx.Var, new))


def analyzer_of(variables: Sequence[tirx.Var], ranges: Ranges) -> sym.Analyzer:
    """Return an analyzer that knows the ranges of variables."""
    analyzer = sym.Analyzer()
    for variable, (first, end) in zip(variables, ranges, strict=True):
        analyzer.bind(variable, tvm.ir.Range(first, end))
    return analyzer


def _is_call(expression: object, name: str) -> bool:
    op = getattr(expression, "op", None)
    return isinstance(expression, tvm.ir.Call) and str(getattr(op, "name", "")).endswith(name)


def _atoms(condition: tirx.Expr) -> list[tirx.Expr]:
    """Return the comparisons of integers that a condition is made of."""
    if isinstance(condition, tirx.And | tirx.Or):
        return _atoms(condition.a) + _atoms(condition.b)
    if isinstance(condition, tirx.Not):
        return _atoms(condition.a)
    if _is_call(condition, ".likely"):
        return _atoms(condition.args[0])
    comparisons = (tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE)
    if isinstance(condition, comparisons) and str(condition.a.ty).startswith("int"):
        return [condition]
    return []


def comparisons_of(value: tirx.Expr) -> list[tirx.Expr]:
    """Return the comparisons of integers by which an expression chooses."""
    found: list[tirx.Expr] = []

    def note_call(call: tvm.ir.Call) -> None:
        if _is_call(call, ".if_then_else"):
            found.extend(_atoms(call.args[0]))

    def note_select(select: tirx.Select) -> None:
        found.extend(_atoms(select.condition))

    structural_walk(value, ((tvm.ir.Call, note_call), (tirx.Select, note_select)))
    return found


def _linear(expression: tirx.Expr, variables: Sequence[tirx.Var]) -> list[int] | None:
    """Return the coefficients of variables and the constant; None where it is not linear."""
    found = list(sym.detect_linear_equation(expression, list(variables)))
    if len(found) != len(variables) + 1 or not all(isinstance(x, tirx.IntImm) for x in found):
        return None
    return [int(x) for x in found]


def _boundaries(atom: tirx.Expr, factor: int, constant: int) -> list[int]:
    """Return where ``factor v + constant`` compared with 0 changes: the first v of each side."""
    if isinstance(atom, tirx.EQ | tirx.NE):
        at = -constant // factor
        return [at, at + 1]
    if isinstance(atom, tirx.LE | tirx.GT):
        constant -= 1
    if factor > 0:
        return [-(constant // factor)]
    return [constant // -factor + 1]


def _cut(box: Box, variables: Sequence[tirx.Var]) -> tuple[int, int] | None:
    """Return an axis and where to cut it, so that a comparison is the same on each side."""
    for atom in comparisons_of(box.value):
        linear = _linear(atom.a - atom.b, variables)
        if linear is None:
            continue
        *factors, constant = linear
        mixed = []
        for axis, ((first, end), factor) in enumerate(zip(box.ranges, factors, strict=True)):
            if end - first == 1:
                constant += factor * first
            elif factor:
                mixed.append((end - first, axis))
        if len(mixed) == 1:
            axis = mixed[0][1]
            first, end = box.ranges[axis]
            for at in _boundaries(atom, factors[axis], constant):
                if first < at < end:
                    return axis, at
        elif mixed and min(mixed)[0] <= MOST_ENUMERATED:
            axis = min(mixed)[1]
            return axis, box.ranges[axis][0] + 1
    return None


def _simplified(domain: Domain, ranges: Ranges) -> Box:
    analyzer = analyzer_of(domain.variables, ranges)
    return Box(ranges=ranges, value=analyzer.simplify(domain.value))


def boxes_of(domain: Domain) -> list[Box] | None:
    """Return the boxes in the order of memory; None where they would be too many."""
    done: list[Box] = []
    open_boxes = [_simplified(domain, tuple((0, extent) for extent in domain.extents))]
    while open_boxes:
        box = open_boxes.pop()
        cut = _cut(box, domain.variables)
        if cut is None:
            done.append(box)
        else:
            axis, at = cut
            first, end = box.ranges[axis]
            for part in ((at, end), (first, at)):
                ranges = (*box.ranges[:axis], part, *box.ranges[axis + 1 :])
                open_boxes.append(_simplified(domain, ranges))
        if len(done) + len(open_boxes) > MOST_BOXES:
            return None
    return sorted(done, key=lambda box: [first for first, _ in box.ranges])


def _divided(expression: tirx.Expr, variables: Sequence[tirx.Var]) -> tuple[int, int] | None:
    """Return an axis whose variable is divided by a constant somewhere, and the constant."""
    found: list[tuple[int, int]] = []

    def note(division: tirx.FloorDiv | tirx.FloorMod) -> None:
        if isinstance(division.b, tirx.IntImm):
            for axis, variable in enumerate(variables):
                if division.a.same_as(variable):
                    found.append((axis, int(division.b)))

    structural_walk(expression, ((tirx.FloorDiv, note), (tirx.FloorMod, note)))
    return min(found, key=lambda row: row[1]) if found else None


def undivided(domain: Domain) -> Domain:
    """Return the domain with axes that are divided by constants as two axes each.

    ``c % 2`` and ``c // 2`` of 116 channels become the axes of 58 and 2.
    """
    variables, extents = list(domain.variables), list(domain.extents)
    indices = list(domain.indices)
    value = analyzer_of(variables, tuple((0, extent) for extent in extents)).simplify(domain.value)
    for _ in range(MOST_ENUMERATED):
        found = _divided(value, variables)
        if found is None or extents[found[0]] % found[1] or extents[found[0]] == found[1]:
            break
        axis, divisor = found
        old = variables[axis]
        outer = tirx.Var(f"{old.name}_o", str(old.ty))
        inner = tirx.Var(f"{old.name}_i", str(old.ty))
        variables[axis : axis + 1] = [outer, inner]
        extents[axis : axis + 1] = [extents[axis] // divisor, divisor]
        analyzer = analyzer_of(variables, tuple((0, extent) for extent in extents))
        whole = outer * divisor + inner
        value = analyzer.simplify(substituted(value, [old], [whole]))
        indices = [substituted(index, [old], [whole]) for index in indices]
    return Domain(
        variables=tuple(variables), extents=tuple(extents), indices=tuple(indices), value=value
    )


def strides_of(
    buffer: tirx.Buffer, indices: Sequence[tirx.Expr], variables: Sequence[tirx.Var]
) -> list[int] | None:
    """Return by how many elements an access moves with each variable; None if that varies."""
    if not indices:
        return [0] * len(variables)
    offset, *others = indices
    for index, extent in zip(others, list(buffer.shape)[1:], strict=True):
        offset = offset * extent + index
    linear = _linear(sym.Analyzer().simplify(offset), variables)
    return None if linear is None else linear[:-1]


def loads_of(value: tirx.Expr) -> list[TensorLoad]:
    """Return every load of an expression."""
    found: list[TensorLoad] = []
    structural_walk(value, (TensorLoad, found.append))
    return found


def depends_beside_loads(value: tirx.Expr, variables: Sequence[tirx.Var]) -> bool:
    """Tell whether an expression uses variables other than to say where it loads."""
    used: list[tirx.Var] = []
    bare = structural_map(
        value, (TensorLoad, lambda load: tirx.const(0, str(load.ty))), order="pre"
    )
    structural_walk(bare, (tirx.Var, used.append))
    return any(variable.same_as(own) for variable in used for own in variables)
