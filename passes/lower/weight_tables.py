"""Tensor expressions that decode single weights: rows of a table, or a whole weight.

They read ``hone.decode_weights``' own layout, in which the levels of a channel follow each other.
Numerics: exact.
"""

from __future__ import annotations

from tvm import te, tirx

from hone.passes.quantize.decode_operator import Decoded

from .weight_words import Words, scale_value


def decode(
    packed: te.Tensor, scale: te.Tensor, *zero_point: te.Tensor, decoded: Decoded
) -> te.Tensor:
    """Return the whole weight as float32, for a reader that has no kernel of its own."""
    shape, axis = decoded.shape, decoded.axis

    def element(*i: tirx.Var) -> tirx.Expr:
        at: tirx.Expr = tirx.const(0, "int64")
        for position, extent in enumerate(shape):
            if position != axis:
                at = at * extent + i[position]
        return weight_at(packed, scale, *zero_point, decoded=decoded, k=i[axis], at=at)

    return te.compute(shape, element, name="decoded_weight")


def weight_at(
    packed: te.Tensor,
    scale: te.Tensor,
    *zero_point: te.Tensor,
    decoded: Decoded,
    k: tirx.Expr,
    at: tirx.Expr,
) -> tirx.Expr:
    """Return one weight of the operator's own layout: channel ``k``, place ``at`` along D."""
    levels = decoded.levels
    held = 8 // levels.bits
    at = tirx.Cast("int64", at)  # as wide as TVM makes indices, see `_steps`
    if levels.scale.size == 1:
        where: tuple[tirx.Expr | int, ...] = (0, 0)
    else:
        where = (k, 0 if levels.scale.shape[1] == 1 else tirx.indexdiv(at, levels.group))
    words = Words(bits=levels.bits, word_bits=8, run=1)
    byte = tirx.Cast("int32", packed[k, tirx.indexdiv(at, held)])
    if levels.bits == 8:
        value: tirx.Expr = tirx.Cast("float32", (byte << 24) >> 24)
    else:
        value = words.level(byte, tirx.indexmod(at, held))
    if levels.bits == 1:
        value = tirx.const(0, "float32") - value
    if zero_point:
        value = value - tirx.Cast("float32", zero_point[0][where])
    return value * scale_value(scale[where])


def take(
    indices: te.Tensor,
    packed: te.Tensor,
    scale: te.Tensor,
    *zero_point: te.Tensor,
    decoded: Decoded,
    mode: str,
) -> te.Tensor:
    """Return rows of a table, decoded: ``[...] → [..., D]``.

    Parameters
    ----------
    indices : te.Tensor
        Integers of any shape.
    packed, scale, zero_point : te.Tensor
        As the operator has them.
    decoded : Decoded
        The table ``[K, D]``.
    mode : {"fast", "clip", "wrap"}
        For an index beyond the table: undefined, the nearest row, modulo K.
    """
    rank, rows = len(indices.shape), decoded.shape[0]

    def row(index: tirx.Expr) -> tirx.Expr:
        if mode == "clip":
            return tirx.min(tirx.max(index, 0), rows - 1)
        return tirx.floormod(index, rows) if mode == "wrap" else index

    return te.compute(
        (*indices.shape, decoded.shape[1]),
        lambda *i: weight_at(
            packed, scale, *zero_point, decoded=decoded, k=row(indices[i[:rank]]), at=i[rank]
        ),
        name="decoded_rows",
    )
