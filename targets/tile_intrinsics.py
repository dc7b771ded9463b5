"""Tensor intrinsics of tiles: load, clear, multiply, store.

A schedule keeps sums and operands of a kernel in buffers of scope `SCOPE` that no instruction ever
touches: their places stand for tile registers. Element (row, lane) of the sums' buffer is in the
tile that ``row // rows`` and ``lane // 16`` number, so the number of a tile follows from where an
intrinsic's operand begins, a constant once loops over tiles are unrolled. `require` registers the
intrinsics of a `TileShape`. Numerics: those of the instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import s_tir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as ib
from tvm.target.codegen import llvm_lookup_intrinsic_id

from .tile_product import (
    FIRST_LEFT,
    FORMS,
    LANES,
    LAST_RIGHT,
    ROW_BYTES,
    TileProduct,
    TileShape,
)

SCOPE = "local"
"""Of buffers that stand for tile registers."""

CONFIGURE = "hone_tiles"
"""Annotation of the loop whose iterations use tiles: ``[rows, groups, left tiles]``."""


@dataclass(frozen=True, kw_only=True)
class TileIntrinsics:
    """Names of the registered intrinsics of a shape.

    ``load_stored`` loads a left operand that another kernel has stored; see `TileForm`.
    """

    clear: str
    load_left: str
    load_stored: str
    load_right: str
    multiply: str
    store: str


@dataclass(frozen=True)
class _Operand:
    """A two- or three-dimensional part of a buffer; ``row`` is the step between its rows."""

    buffer: tirx.Buffer
    row: tirx.Expr

    @property
    def whole(self) -> tirx.Expr:
        return self.buffer[tuple(slice(0, int(extent)) for extent in self.buffer.shape)]


Body = Callable[..., None]


def instruction(name: str, *arguments: tirx.Expr) -> tirx.Expr:
    """Return the call of an LLVM intrinsic of x86 without a result."""
    number = tirx.const(llvm_lookup_intrinsic_id(f"llvm.x86.{name}"), "uint32")
    return tirx.call_llvm_intrin("void", number, *arguments)


def _operand(name: str, shape: Sequence[int], dtype: str, scope: str, strided: bool) -> _Operand:
    strides = [tirx.Var(f"{name}_{axis}", "int32") for axis in range(len(shape) - 1)]
    buffer = ib.Buffer(
        tuple(shape),
        dtype,
        strides=[*strides, 1] if strided else None,
        scope=scope,
        offset_factor=1,
    )
    return _Operand(ib.arg(name, buffer), strides[0])


def _function(declare: Callable[[bool], None], *, instructions: bool) -> tirx.PrimFunc:
    with IRBuilder() as builder:
        with ib.prim_func(s_tir=True):
            ib.func_name("main")
            declare(instructions)
        return builder.get()


def _register(name: str, declare: Callable[[bool], None]) -> str:
    """Register an intrinsic: its loops, and the instructions that stand for them."""
    if s_tir.TensorIntrin.get(name, allow_missing=True) is None:
        s_tir.TensorIntrin.register(
            name,
            _function(declare, instructions=False),
            _function(declare, instructions=True),
        )
    return name


def _number(operand: _Operand, rows: int, length: int) -> tirx.Expr:
    """Return which tile of its buffer an operand is: tiles of one row of tiles come first."""
    offset, row = operand.buffer.elem_offset, operand.row
    down = tirx.indexdiv(offset, row * rows)
    across = tirx.indexdiv(tirx.indexmod(offset, row), length)
    return down * tirx.indexdiv(row, length) + across


def _byte(number: tirx.Expr) -> tirx.Expr:
    return tirx.Cast("int8", number)


def _sums(operand: _Operand, shape: TileShape) -> tirx.Expr:
    return _byte(_number(operand, shape.rows, LANES))


def _left(operand: _Operand, shape: TileShape) -> tirx.Expr:
    return _byte(_number(operand, shape.rows, shape.depth) + FIRST_LEFT)


def _right(operand: _Operand, shape: TileShape) -> tirx.Expr:
    size = shape.groups * LANES * FORMS[shape.product].group
    return _byte(LAST_RIGHT - tirx.indexdiv(operand.buffer.elem_offset, size))


def _address(operand: _Operand) -> tirx.Expr:
    """Return where an operand begins.

    Not ``access_ptr``: its type must be that of the memory, which TVM shares between buffers of
    different types.
    """
    first = operand.buffer[(0,) * len(operand.buffer.shape)]
    return tirx.address_of(first)


def _step(operand: _Operand, dtype: str) -> tirx.Expr:
    """Return the bytes from one row of an operand in memory to the next."""
    return tirx.Cast("int64", operand.row * tirx.const(_bytes_of(dtype), "int32"))


def _bytes_of(dtype: str) -> int:
    return {"uint8": 1, "int8": 1, "uint16": 2, "int32": 4, "float32": 4}[dtype]


def _copy(
    extents: Sequence[int],
    dtype: str,
    *,
    to_tile: bool,
    body: Callable[[_Operand, _Operand], None],
    stored: str = "",
) -> Callable[[bool], None]:
    """Declare a copy between memory, which may hold elements of another dtype, and a tile."""

    def declare(instructions: bool) -> None:
        scopes = ("global", SCOPE) if to_tile else (SCOPE, "global")
        source = _operand("source", extents, stored or dtype, scopes[0], instructions)
        target = _operand("target", extents, dtype, scopes[1], instructions)
        with ib.sblock("root"):
            ib.reads(source.whole)
            ib.writes(target.whole)
            if instructions:
                body(source, target)
                return
            with ib.grid(*extents) as loops, ib.sblock("copy"):
                axes = [
                    ib.axis.spatial(extent, loop)
                    for extent, loop in zip(extents, loops, strict=True)
                ]
                element = source.buffer[tuple(axes)]
                if stored not in ("", dtype):
                    element = tirx.reinterpret(dtype, element)
                ib.buffer_store(target.buffer, element, axes)

    return declare


def _clear(shape: TileShape) -> Callable[[bool], None]:
    form = FORMS[shape.product]

    def declare(instructions: bool) -> None:
        sums = _operand("sums", (shape.rows, LANES), form.sums, SCOPE, instructions)
        with ib.sblock("root"):
            ib.reads()
            ib.writes(sums.whole)
            if instructions:
                ib.evaluate(instruction("tilezero", _sums(sums, shape)))
                return
            with ib.grid(shape.rows, LANES) as (i, j), ib.sblock("clear"):
                row, lane = ib.axis.spatial(shape.rows, i), ib.axis.spatial(LANES, j)
                ib.buffer_store(sums.buffer, tirx.const(0, form.sums), [row, lane])

    return declare


def tile_term(left: tirx.Expr, right: tirx.Expr, product: TileProduct) -> tirx.Expr:
    """Return one product of two elements in the dtype of the sums, as the intrinsics expect it."""
    if product is TileProduct.TDPBF16PS:
        return _widened(left) * _widened(right)
    dtype = FORMS[product].sums
    return tirx.Cast(dtype, left) * tirx.Cast(dtype, right)


def _widened(bits: tirx.Expr) -> tirx.Expr:
    """Return the float32 that the bits of a bfloat16 are the upper half of."""
    return tirx.reinterpret("float32", tirx.Cast("uint32", bits) << tirx.const(16, "uint32"))


def _multiply(shape: TileShape) -> Callable[[bool], None]:
    form = FORMS[shape.product]

    def declare(instructions: bool) -> None:
        left = _operand("left", (shape.rows, shape.depth), form.left, SCOPE, instructions)
        right = _operand(
            "right", (shape.groups, LANES, form.group), form.right, SCOPE, instructions
        )
        sums = _operand("sums", (shape.rows, LANES), form.sums, SCOPE, instructions)
        with ib.sblock("root"):
            ib.reads(sums.whole, left.whole, right.whole)
            ib.writes(sums.whole)
            if instructions:
                tiles = _sums(sums, shape), _left(left, shape), _right(right, shape)
                ib.evaluate(instruction(shape.product, *tiles))
                return
            loops = ib.grid(shape.rows, LANES, shape.groups, form.group)
            with loops as (i, j, g, b), ib.sblock("multiply"):
                row, lane = ib.axis.spatial(shape.rows, i), ib.axis.spatial(LANES, j)
                group, element = ib.axis.reduce(shape.groups, g), ib.axis.reduce(form.group, b)
                term = tile_term(
                    left.buffer[row, group * form.group + element],
                    right.buffer[group, lane, element],
                    shape.product,
                )
                ib.buffer_store(sums.buffer, sums.buffer[row, lane] + term, [row, lane])

    return declare


def require(shape: TileShape) -> TileIntrinsics:
    """Register the intrinsics of a shape, unless they are, and return their names.

    Parameters
    ----------
    shape : TileShape
        ``left_tiles`` and ``right_tiles`` do not matter: unrolled loops number the tiles.
    """
    form = FORMS[shape.product]
    name = f"hone_{shape.product}_{{}}_{shape.rows}x{shape.groups}"

    def load_left(source: _Operand, target: _Operand) -> None:
        place = _address(source), _step(source, form.left)
        ib.evaluate(instruction("tileloadd64", _left(target, shape), *place))

    def load_right(source: _Operand, target: _Operand) -> None:
        place = _address(source), tirx.const(ROW_BYTES, "int64")
        ib.evaluate(instruction("tileloadd64", _right(target, shape), *place))

    def store(source: _Operand, target: _Operand) -> None:
        place = _address(target), _step(target, form.sums)
        ib.evaluate(instruction("tilestored64", _sums(source, shape), *place))

    rows, groups, depth = shape.rows, shape.groups, shape.depth
    return TileIntrinsics(
        clear=_register(name.format("clear"), _clear(shape)),
        load_left=_register(
            name.format("left"), _copy((rows, depth), form.left, to_tile=True, body=load_left)
        ),
        load_stored=_register(
            name.format(f"stored_{form.stored}"),
            _copy((rows, depth), form.left, to_tile=True, body=load_left, stored=form.stored),
        ),
        load_right=_register(
            name.format("right"),
            _copy((groups, LANES, form.group), form.right, to_tile=True, body=load_right),
        ),
        multiply=_register(name.format("multiply"), _multiply(shape)),
        store=_register(
            name.format("store"), _copy((rows, LANES), form.sums, to_tile=False, body=store)
        ),
    )
