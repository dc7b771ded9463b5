"""Computes the first layers of an image network in bands of rows, so that less is in memory.

Rewrites a region of a graph that one image enters and one image leaves (convolutions, pools and
elementwise operators between them, residuals included): each band of output rows is computed from
its input rows and a margin, all layers of one band before the next band begins, and the bands are
concatenated. The large images between the layers never exist as a whole (Lin et al. 2021, MCUNetV2:
patch-based inference). Runs on NCHW, before the layout changes. Numerics: exact, each output
element is the same sum; rows of a margin are computed twice.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import tvm
from tvm import relax

from hone.errors import UsageError

from .bands import Bands, Region, cut, reads
from .dataflow import PART, Rebuilder, is_dataflow, layer_of
from .row_windows import ROWS, Rows, on_rows


@relax.transform.function_pass(opt_level=0)
class SplitPatches:
    """Compute a region of a graph in bands of rows.

    Parameters
    ----------
    layers : sequence of str or None
        Names of the bindings that carry layers of the region; it is the smallest one with all of
        them. None takes the region and the number of bands that need the least memory, or leaves
        the function as it is where none needs less.
    parts : int or None
        Bands, at least 2; None only where no layers are given.

    Raises
    ------
    UsageError
        When the pass is applied: a layer does not exist, no region of operators that can be split
        holds all layers, or its result has fewer rows than parts.
    """

    def __init__(self, *, layers: Sequence[str] | None, parts: int | None) -> None:
        if parts is not None and parts < 2:
            raise UsageError(f"parts must be at least 2, not {parts}")
        if layers is not None and (not layers or parts is None):
            raise UsageError("a split of chosen layers needs at least one layer, and parts")
        self._layers = None if layers is None else tuple(layers)
        self._parts = parts

    def transform_function(
        self, function: relax.Function, _module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> relax.Function:
        """Return the function with its region in bands, or the very same function."""
        if not is_dataflow(function):
            return function
        bands = Bands(function)
        if self._layers is None:
            found = [f for f in bands.ranked() if self._parts in (None, f.parts)]
            return _rewrite(bands, found[0].region, found[0].parts) if found else function
        return _rewrite(bands, self._region(bands), self._parts or 2)

    def _region(self, bands: Bands) -> Region:
        names = {layer_of(binding.var) for binding in bands.graph.bindings}
        problems = []
        for layer in self._layers or ():
            if layer not in names:
                near = difflib.get_close_matches(layer, names, n=1)
                meant = f", did you mean {near[0]!r}?" if near else ""
                problems.append(f"{layer!r} is no layer{meant}")
        if problems:
            raise UsageError("cannot split into patches: " + "; ".join(problems))
        region = bands.around(self._layers or ())
        if region is None:
            raise UsageError(
                "cannot split into patches: no part of the network with these layers has one image "
                "for its input and one for its result, and only convolutions with constant "
                "weights, pools and elementwise operators between them",
                hint='axis = "patches" with layers = ["auto"] finds what can be split',
            )
        rows = bands.rows[region.exit]
        if self._parts is not None and rows < self._parts:
            last = layer_of(bands.values[region.exit])
            raise UsageError(
                f"cannot split into patches: the result of {last!r} has only {rows} rows"
            )
        return region


def _rewrite(bands: Bands, region: Region, parts: int) -> relax.Function:
    """Return the function with a region in bands."""
    graph = bands.graph
    builder = Rebuilder(graph.function)
    for position, binding in enumerate(graph.bindings):
        if position < region.first or position > region.last:
            builder.copy(binding)
        elif position == region.last:
            pieces = [
                _band(bands, builder, region, rows, number)
                for number, rows in enumerate(cut(bands.rows[region.exit], parts))
            ]
            builder.bind(binding.var, relax.op.concat(pieces, axis=ROWS))
    return builder.finish()


def _band(bands: Bands, builder: Rebuilder, region: Region, rows: Rows, number: int) -> relax.Var:
    """Append the operators of one band; return its piece of the result."""
    needed = bands.needs(region, rows)
    held = {**needed, region.entry: Rows(0, bands.rows[region.entry])}
    made: dict[int, relax.Expr] = {region.entry: builder.use(bands.values[region.entry])}
    sliced: dict[tuple[int, Rows], relax.Expr] = {}

    def piece(number_of: int, read: Rows) -> relax.Expr:
        if held[number_of] == read:
            return made[number_of]
        if (number_of, read) not in sliced:
            start = held[number_of].first
            part = relax.op.strided_slice(
                made[number_of], axes=[ROWS], begin=[read.first - start], end=[read.end - start]
            )
            name = f"{bands.values[number_of].name}{PART}rows{number}"
            sliced[number_of, read] = builder.emit(part, name)
        return sliced[number_of, read]

    for position in range(region.first, region.last + 1):
        binding, step = bands.graph.bindings[position], bands.steps[position]
        if step.made not in needed:
            continue
        read, (above, below) = reads(step, needed[step.made])
        numbers = iter(step.operands)
        operands = [
            piece(next(numbers), read) if isinstance(operand, relax.Var) else operand
            for operand in binding.value.args
        ]
        call = on_rows(binding.value, operands, above=above, below=below)
        made[step.made] = builder.emit(call, f"{binding.var.name}{PART}band{number}")
    return made[region.exit]
