"""The model that chooses tiles for a convolution or matrix product, and says what they cost.

Pixels are the rows of tiles: the output pixels of an image as one sequence, 16 of them in a tile,
or fewer where that divides better. All cycles are those of one core.

Source of cycles: Intel 64 and IA-32 Architectures Optimization Reference Manual, document 248966,
chapter on AMX: a product issues every 16 cycles, a tile load takes 8, a store 16. The prototype
(docs/performance.md) reached 5.2 of the 6.9 TOPS with its operands in L2 instead of L1, which makes
21 cycles for a load from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from hone.targets.half_dot import HalfDot
from hone.targets.integer_dot import IntegerDot
from hone.targets.tile_product import (
    FORMS,
    GROUP_BYTES,
    ROW_BYTES,
    TILE_ROWS,
    TileProduct,
    TileShape,
)

from .machine import Machine

PRODUCT_CYCLES = 16
L1_LOAD_CYCLES, L2_LOAD_CYCLES = 8, 21
STORE_CYCLES = 16
# From the last product of a block until its sums can be read.
BLOCK_CYCLES = 52
# Sustained, from L2: the copy of the pixels that a row of taps sees.
COPY_BYTES_PER_CYCLE = 16
# Rows that many bytes apart share few sets of L1: prototypes lost half of their rate.
SAME_SETS_BYTES = 1024
SAME_SETS_FACTOR = 2.0
PADDING_BYTES = 64
# Tiles must be modelled this much faster than vectors: the model of neither is exact.
TILE_GAIN = 1.2
# Rows and groups of a tile: loops of one iteration vanish, and an intrinsic is not found any more.
LEAST = 2

# Left and right tiles: with their sums at most eight, most reuse first.
_BLOCKS = ((2, 2), (3, 1), (1, 3), (2, 1), (1, 2), (1, 1))
# Vector instructions that a group of one pixel and one vector of channels costs, and how many
# issue in a cycle: counted on the generated code (docs/performance.md).
_VECTOR_CYCLES: Mapping[IntegerDot | HalfDot | None, float] = {
    IntegerDot.VPDPBUSD: 0.5,
    HalfDot.VDPBF16PS: 0.5,
    IntegerDot.VPMADDWD: 1.4,
    None: 3.0,
}


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """How a kernel uses tiles.

    Parameters
    ----------
    shape : TileShape
        The tiles.
    steps : int
        Products that a row of taps takes.
    pitch : int
        Elements from one pixel to the next in the left operand's memory, at least
        ``steps x shape.depth``.
    in_place : bool
        The left operand is read where it is; else it is copied, one row of taps for each pixel.
    cycles : float
        Modelled, on one core.
    """

    shape: TileShape
    steps: int
    pitch: int
    in_place: bool
    cycles: float

    @property
    def name(self) -> str:
        """Return what tells this plan from the others of a layer."""
        shape = self.shape
        tiles = f"{shape.rows}x{shape.groups} {shape.left_tiles}x{shape.right_tiles}"
        return f"{tiles} in place" if self.in_place else tiles


@dataclass(frozen=True, kw_only=True)
class TileWork:
    """A convolution or matrix product as tiles see it.

    Parameters
    ----------
    product : TileProduct
        The instruction.
    images : int
        Sequences of pixels.
    pixels : int
        Of one image: output positions, or rows of a matrix.
    filters : int
        Output channels.
    taps : int
        Rows of taps, each of which is one run of input.
    run : int
        Elements of a run: input channels times taps in a row.
    copy_rows : int
        Pixels that a copy holds for each image.
    contiguous : bool
        The data is a matrix of runs as it is, and may be read in place.
    """

    product: TileProduct
    images: int
    pixels: int
    filters: int
    taps: int
    run: int
    copy_rows: int
    contiguous: bool

    @property
    def name(self) -> str:
        """Return where tuning finds the choice between this layer's plans."""
        extents = f"{self.images}x{self.pixels}x{self.taps}x{self.run}"
        return f"{self.product} {extents} to {self.filters}"


def _rounded(extent: int, step: int) -> int:
    return -(-extent // step) * step


def _rows(pixels: int, left_tiles: int, *, exact: bool) -> int | None:
    """Return the rows of a tile that waste least; None where none divides the pixels exactly."""
    tiles = _rounded(-(-pixels // TILE_ROWS), left_tiles)
    if not exact:
        return max(-(-pixels // tiles), LEAST)
    for count in range(tiles, pixels // LEAST + 1, left_tiles):
        if pixels % count == 0:
            return pixels // count
    return None


def _groups(run: int, group: int, *, exact: bool) -> int | None:
    """Return the groups of one product; None where no number of them divides the run exactly."""
    most = ROW_BYTES // GROUP_BYTES
    if not exact:
        groups = -(-run // group)
        return max(-(-groups // -(-groups // most)), LEAST)
    if run % group:
        return None
    groups = run // group
    return next((g for g in range(min(most, groups), LEAST - 1, -1) if groups % g == 0), None)


def _plan(
    work: TileWork, left_tiles: int, right_tiles: int, *, in_place: bool, l1_bytes: int
) -> TilePlan | None:
    form = FORMS[work.product]
    rows = _rows(work.pixels, left_tiles, exact=in_place)
    groups = _groups(work.run, form.group, exact=in_place)
    if rows is None or groups is None:
        return None
    shape = TileShape(
        product=work.product,
        rows=rows,
        groups=groups,
        left_tiles=left_tiles,
        right_tiles=right_tiles,
    )
    steps = -(-work.run // shape.depth)
    element = GROUP_BYTES // form.group
    pitch = steps * shape.depth
    if not in_place and pitch * element % SAME_SETS_BYTES == 0:
        pitch += PADDING_BYTES // element
    crowded = pitch * element % SAME_SETS_BYTES == 0
    # The weights of a block of filters stay in L1 while pixels pass by, if they fit.
    kept = work.taps * steps * shape.depth * element * shape.block_lanes <= l1_bytes // 2
    loads = left_tiles * L2_LOAD_CYCLES * (SAME_SETS_FACTOR if crowded else 1.0)
    loads += right_tiles * (L1_LOAD_CYCLES if kept else L2_LOAD_CYCLES)
    step = max(PRODUCT_CYCLES * left_tiles * right_tiles, loads)
    block = work.taps * steps * step + STORE_CYCLES * left_tiles * right_tiles + BLOCK_CYCLES
    blocks = -(-work.pixels // shape.block_rows) * -(-work.filters // shape.block_lanes)
    copied = 0 if in_place else work.copy_rows * pitch * element
    return TilePlan(
        shape=shape,
        steps=steps,
        pitch=pitch,
        in_place=in_place,
        cycles=work.images * (blocks * block + copied / COPY_BYTES_PER_CYCLE),
    )


@cache
def ranked_plans(work: TileWork, l1_bytes: int) -> tuple[TilePlan, ...]:
    """Return the plans of a layer, the least modelled cycles first.

    A step, which is 64 bytes of each pixel's run, takes ``max(16 x products, loads)`` cycles; a
    block adds the stores of its sums and 52 cycles that nothing hides; a copied left operand adds
    its bytes over 16.

    Worked number: 56 x 56 pixels, 64 filters, 3 taps of 192 bytes: 98 blocks of 2 x 2 tiles of 16
    rows by 2 blocks of filters, each 9 steps of 64 cycles, 64 for its stores and 52: 135 632, and
    38 976 for the copy of 58 x 56 runs: 174 608 cycles. In vectors of 16 lanes it is 3136 pixels x
    4 vectors x 144 groups / 2 = 903 168.

    Parameters
    ----------
    work : TileWork
        The layer.
    l1_bytes : int
        First level cache of a core.
    """
    plans = []
    for left_tiles, right_tiles in _BLOCKS:
        for in_place in (True, False):
            if in_place and not work.contiguous:
                continue
            plan = _plan(work, left_tiles, right_tiles, in_place=in_place, l1_bytes=l1_bytes)
            if plan is not None:
                plans.append(plan)
    return tuple(sorted(plans, key=lambda plan: plan.cycles))


def vector_cycles(work: TileWork, dot: IntegerDot | HalfDot | None, lanes: int) -> float:
    """Return the modelled cycles of the same layer in vectors, without padding and epilogue.

    Parameters
    ----------
    work : TileWork
        The layer.
    dot : IntegerDot, HalfDot or None
        The vector instruction.
    lanes : int
        Sums of a vector.
    """
    groups = work.taps * -(-work.run // FORMS[work.product].group)
    vectors = -(-work.filters // lanes)
    return work.images * work.pixels * vectors * groups * _VECTOR_CYCLES[dot]


def tiles_pay(plan: TilePlan, vectors: float) -> bool:
    """Say whether a plan is worth more than the vector form that takes so many cycles."""
    return plan.cycles * TILE_GAIN < vectors


def choose_plan(machine: Machine, work: TileWork, vectors: float) -> TilePlan | None:
    """Return the tiles of a layer, or None where vectors are modelled faster.

    Parameters
    ----------
    machine : Machine
        Has the instruction of the product.
    work : TileWork
        The layer.
    vectors : float
        Modelled cycles, on one core, of the best form in vectors.
    """
    plans = ranked_plans(work, machine.l1_bytes)
    options: dict[str, TilePlan | None] = {plan.name: plan for plan in plans}
    if tiles_pay(plans[0], vectors):
        options["vectors"] = None
    else:
        options = {"vectors": None, **options}
    return machine.pick(work.name, options)
