"""Finds what of an image network can be computed in bands of rows, and what that would save.

What `SplitPatches` rests on: regions of a graph that one image enters and one image leaves, the
rows that each value of a band needs, and a forecast of the memory. Numerics: none, it only looks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from .dataflow import Dataflow, layer_of, shape_of, variables
from .row_windows import ROWS, Rows, Window, is_elementwise, is_image, window_of

MOST_PARTS = 8
"""Bands that are considered when none are asked for."""

MOST_ENTRIES = 3
"""Images that are considered as a region's input: the large ones are at the beginning."""

WORTHWHILE = 0.9
"""Share of the memory that a split may need at most to be proposed."""

MOST_WORK = 1.5
"""Multiply-adds that a proposed split may take, over those of the whole region."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of a graph between two images.

    Parameters
    ----------
    first, last : int
        Positions of its bindings.
    entry, exit : int
        Numbers of the image that it reads, and of the one that it makes, see `Bands`.
    """

    first: int
    last: int
    entry: int
    exit: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a split is expected to bring.

    Parameters
    ----------
    region : Region
        What is split.
    parts : int
        Bands.
    peak_bytes, whole_bytes : int
        Largest sum of images that exist at one time, with the split and without.
    work : float
        Multiply-adds over those without the split.
    """

    region: Region
    parts: int
    peak_bytes: int
    whole_bytes: int
    work: float


def _bytes(expr: relax.Expr, rows: int | None = None) -> int:
    if not isinstance(expr.ty, relax.TensorType):
        return 0
    shape = list(shape_of(expr))
    if rows is not None:
        shape[ROWS] = rows
    return math.prod(shape) * int(tvm.runtime.DataType(str(expr.ty.dtype)).itemsize)


def cut(rows: int, parts: int) -> list[Rows]:
    """Return bands of nearly equal height, the first ones larger by a row where need be."""
    ends = np.cumsum([len(part) for part in np.array_split(np.arange(rows), parts)])
    return [Rows(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What a forecast wants to know of one binding.

    Parameters
    ----------
    made : int
        Number of the result.
    operands : tuple of int
        Numbers of what it reads.
    window : Window or None
        How its rows follow from theirs; None where it cannot be computed for some rows only.
    height : int
        Rows of the operands.
    elementwise : bool
        Whether it is computed where its producer is.
    taps : int
        Products that are summed for one element.
    """

    made: int
    operands: tuple[int, ...]
    window: Window | None
    height: int
    elementwise: bool
    taps: int


def _step(binding: relax.VarBinding, numbers: Mapping[relax.Var, int]) -> _Step:
    call = binding.value
    operands = tuple(variables(call))
    window = None
    if isinstance(call, relax.Call) and is_image(call) and operands and is_image(operands[0]):
        window = window_of(call)
    elementwise = isinstance(call, relax.Call) and is_elementwise(call)
    taps = 1
    if window is not None and len(call.args) > 1 and not elementwise:
        taps = math.prod(shape_of(call.args[1])[1:])
    return _Step(
        made=numbers[binding.var],
        operands=tuple(numbers[var] for var in operands),
        window=window,
        height=shape_of(operands[0])[ROWS] if window is not None else 0,
        elementwise=elementwise,
        taps=taps,
    )


class Bands:
    """The regions of a function, and what each of their values needs.

    Values have numbers: parameters first, then the results of the bindings in order.

    Parameters
    ----------
    function : relax.Function
        One dataflow block.
    """

    def __init__(self, function: relax.Function) -> None:
        self.graph = Dataflow(function)
        self.values = [*function.params, *(binding.var for binding in self.graph.bindings)]
        numbers = {var: number for number, var in enumerate(self.values)}
        self.steps = [_step(binding, numbers) for binding in self.graph.bindings]
        self._bytes = {number: _bytes(var) for number, var in enumerate(self.values)}
        self.rows = {n: shape_of(var)[ROWS] for n, var in enumerate(self.values) if is_image(var)}
        results = [numbers[var] for var in variables(function.body.body)]
        self._cuts = self._find_cuts(results, len(function.params))
        self._whole = _peak(self.steps, self._bytes)
        self._before: dict[int, int] = {}
        self._after: dict[int, int] = {}

    def _find_cuts(self, results: Sequence[int], params: int) -> dict[int, int]:
        """Return the positions behind which one image alone is alive; -1 is the beginning."""
        last_use = _last_uses(self.steps) | dict.fromkeys(results, len(self.steps))
        alive = {number for number in range(params) if number in last_use}
        cuts: dict[int, int] = {}
        for position in range(-1, len(self.steps)):
            if position >= 0:
                alive = {number for number in alive if last_use[number] > position}
                made = self.steps[position].made
                if last_use.get(made, -1) > position:
                    alive.add(made)
            if len(alive) == 1 and (only := next(iter(alive))) in self.rows:
                cuts[position] = only
        return cuts

    def regions(self) -> list[Region]:
        """Return every region; those that begin early come first."""
        found = []
        for start, entry in self._cuts.items():
            for position in range(start + 1, len(self.steps)):
                if self.steps[position].window is None:
                    break
                if self._cuts.get(position) is not None:
                    made = self.steps[position].made
                    found.append(Region(first=start + 1, last=position, entry=entry, exit=made))
        return found

    def around(self, layers: Sequence[str]) -> Region | None:
        """Return the smallest region with all of some layers in it."""
        chosen = set(layers)
        at = [i for i, b in enumerate(self.graph.bindings) if layer_of(b.var) in chosen]
        fitting = [r for r in self.regions() if r.first <= min(at) <= max(at) <= r.last]
        return min(fitting, key=lambda r: r.last - r.first, default=None)

    def needs(self, region: Region, rows: Rows) -> dict[int, Rows]:
        """Return the rows of each value, within the image, that a band of the exit needs."""
        needed: dict[int, Rows] = {region.exit: rows}
        for step in reversed(self.steps[region.first : region.last + 1]):
            if step.made not in needed:
                continue  # nothing of this band reads it
            read, _ = reads(step, needed[step.made])
            for operand in step.operands:
                needed[operand] = needed.get(operand, read) | read
        return needed

    def _size(self, number: int, rows: Rows) -> int:
        return self._bytes[number] * len(rows) // self.rows[number]

    def forecast(self, region: Region, parts: int) -> Forecast:
        """Return what a split is expected to bring."""
        steps = self.steps[region.first : region.last + 1]
        done = peak = bands = 0
        for rows in cut(self.rows[region.exit], parts):
            needed = self.needs(region, rows)
            sizes = {number: self._size(number, part) for number, part in needed.items()}
            # The band of the input is a copy; the input stays until the last band.
            peak = max(peak, done + self._bytes[region.entry] + _peak(steps, sizes))
            bands += sum(sizes.get(s.made, 0) * s.taps for s in steps if not s.elementwise)
            done += sizes[region.exit]
        whole = sum(self._bytes[step.made] * step.taps for step in steps if not step.elementwise)
        return Forecast(
            region=region,
            parts=parts,
            peak_bytes=max(peak, 2 * done, self._outside(region)),
            whole_bytes=self._whole,
            work=bands / max(whole, 1),
        )

    def _least(self, region: Region, parts: int) -> int:
        """Return what a split needs whatever its bands are: the input beside most of the result."""
        result = self._bytes[region.exit]
        return max(2 * result, self._bytes[region.entry] + result * (parts - 1) // parts)

    def _hopeful(self) -> list[Region]:
        """Return the regions outside of which little memory is needed, with the first entries."""
        most = WORTHWHILE * self._whole
        hopeful = [
            region
            for region in self.regions()
            if 2 * self._bytes[region.exit] <= most and self._outside(region) <= most
        ]
        entries = sorted({region.first for region in hopeful})[:MOST_ENTRIES]
        return [region for region in hopeful if region.first in entries]

    def _outside(self, region: Region) -> int:
        """Return the peak before and behind a region."""
        if region.first not in self._before:
            self._before[region.first] = _peak(self.steps[: region.first], self._bytes)
        if region.last not in self._after:
            self._after[region.last] = _peak(self.steps[region.last + 1 :], self._bytes)
        return max(self._before[region.first], self._after[region.last])

    def ranked(self) -> list[Forecast]:
        """Return the splits that are worthwhile, those that need the least memory first.

        For each number of bands the best region.
        """
        found: dict[int, Forecast] = {}
        for region in self._hopeful():
            for parts in range(2, min(MOST_PARTS, self.rows[region.exit]) + 1):
                best = found.get(parts)
                if best is not None and self._least(region, parts) >= best.peak_bytes:
                    continue
                made = self.forecast(region, parts)
                worthwhile = made.peak_bytes <= WORTHWHILE * made.whole_bytes
                if not worthwhile or made.work > MOST_WORK:
                    continue
                if best is None or (made.peak_bytes, made.work) < (best.peak_bytes, best.work):
                    found[parts] = made
        return sorted(found.values(), key=lambda forecast: (forecast.peak_bytes, forecast.work))


def reads(step: _Step, rows: Rows) -> tuple[Rows, tuple[int, int]]:
    """Return the input rows of some output rows, and the padding above and below them."""
    if step.window is None:
        raise RuntimeError(f"value {step.made} was checked to have a window, and has none")
    wanted = step.window.reads(rows)
    inside = Rows(max(wanted.first, 0), min(wanted.end, step.height))
    return inside, (inside.first - wanted.first, wanted.end - inside.end)


def _last_uses(steps: Sequence[_Step]) -> dict[int, int]:
    return {number: at for at, step in enumerate(steps) for number in step.operands}


def _peak(steps: Sequence[_Step], sizes: Mapping[int, int]) -> int:
    """Return the largest sum of values that exist at one time.

    An elementwise operator is computed where its producer is: it takes the place of an operand of
    the same size that nobody reads any more.
    """
    last_use = _last_uses(steps)
    defined = {step.made for step in steps}
    alive = {n: sizes[n] for n in last_use if n not in defined and n in sizes}
    peak = total = sum(alive.values())
    for position, step in enumerate(steps):
        size = sizes.get(step.made, 0)
        dying = [n for n in set(step.operands) if n in alive and last_use[n] == position]
        if step.elementwise:
            taken = next((n for n in dying if alive[n] == size), None)
            if taken is not None:
                total -= alive.pop(taken)
        alive[step.made] = size
        total += size
        peak = max(peak, total)
        for number in dying:
            total -= alive.pop(number, 0)
    return peak
