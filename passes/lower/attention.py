"""Lowers attention to one TIR function in which the scores of a few rows exist at a time.

Rewrites ``relax.nn.attention`` in float32, ``softmax(Q K^T scale + bias) V``. A block of rows takes
its products with all keys, its softmax and its products with the values without leaving the core's
cache; the keys are transposed once for each head. Heads that are a slice of a wider tensor are read
where they lie. Runs at legalization. Numerics: sums may be taken in another order; for exp see
`elementary`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from tvm import relax, te, tirx
from tvm.ir import Op

from hone.targets.schedule.attention import TILE
from hone.targets.schedule.machine import Machine, Tile, choose_tile

from .anchors import ANCHOR, default_legalization
from .elementary import exp
from .reductions import MAX, SUM, reduce_rows

_SLICE = Op.get("relax.strided_slice")


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Which of the heads of ``[B, rows, all heads, D]`` an operand is.

    Parameters
    ----------
    operand : int
        Position among the kernel's arguments.
    first, step : int
        Head h of the operand is head ``first + step h`` of the argument.
    """

    operand: int
    first: int
    step: int


def choose_rows(machine: Machine, *, rows: int, keys: int, depth: int) -> Tile:
    """Choose the register tile of the scores: rows in ``columns``, vectors of keys."""
    return choose_tile(machine, height=1, width=rows, channels=keys, depth=depth, taps=1)


def fits(machine: Machine, *, rows: int, keys: int, depth: int, channels: int) -> bool:
    """Say whether the kernel can take attention of this size.

    Vectors must run along the channels of the values, and a block of scores must fit half of L2.
    """
    tile = choose_rows(machine, rows=rows, keys=keys, depth=depth)
    width = tile.vectors * machine.lanes
    padded = -(-keys // width) * width
    return (
        math.gcd(channels, machine.lanes) >= min(machine.lanes, 4)
        and depth == channels
        and tile.columns * padded * 4 <= machine.l2_bytes // 2
    )


def attention(
    *operands: te.Tensor,
    query: Heads,
    key: Heads,
    value: Heads,
    bias: int | None,
    shape: tuple[int, int, int, int, int],
    scale: float,
    tile: Tile,
    lanes: int,
) -> te.Tensor:
    """Return ``softmax(Q K^T scale + bias) V`` as ``[B, M, H, D]``.

    Parameters
    ----------
    operands : te.Tensor
        ``[B, rows, heads, D]`` each; the bias ``[B or 1, H or 1, M or 1, S]``.
    query, key, value : Heads
        Where they are among the operands.
    bias : int or None
        Where the bias is.
    shape : tuple of int
        ``(B, M, S, H, D)``.
    scale : float
        Of the products.
    tile : Tile
        ``columns`` rows of ``vectors`` of keys; the numbers of both are rounded up to it.
    lanes : int
        Of one vector.
    """
    batch, rows, keys, heads, depth = shape
    width = tile.vectors * lanes
    wide = -(-keys // width) * width
    long = -(-rows // tile.columns) * tile.columns
    zero, least = tirx.const(0.0, "float32"), tirx.min_value("float32")

    def read(of: Heads, b: tirx.Expr, row: tirx.Expr, h: tirx.Expr, d: tirx.Expr) -> tirx.Expr:
        return operands[of.operand][b, row, h * of.step + of.first, d]

    turned = te.compute(
        (batch, heads, depth, wide),
        lambda b, h, d, s: (
            read(key, b, s, h, d)
            if wide == keys
            else tirx.if_then_else(s < keys, read(key, b, s, h, d), zero)
        ),
        name="attn_keys",
    )
    d = te.reduce_axis((0, depth), "d")

    def row(m: tirx.Expr) -> tirx.Expr:
        return m if long == rows else tirx.min(m, rows - 1)

    products = te.compute(
        (batch, heads, long, wide),
        lambda b, h, m, s: te.sum(read(query, b, row(m), h, d) * turned[b, h, d, s], axis=d),
        name="attn_products",
    )
    added = None
    if bias is not None:
        source = operands[bias]
        ones = [int(extent) == 1 for extent in source.shape]
        own = [
            1 if one else extent for one, extent in zip(ones, (batch, heads, long), strict=False)
        ]

        def biased(b: tirx.Expr, h: tirx.Expr, m: tirx.Expr, s: tirx.Expr) -> tirx.Expr:
            inside = source[b, h, m if ones[2] else row(m), s]
            return inside if wide == keys else tirx.if_then_else(s < keys, inside, least)

        added = te.compute((*own, wide), biased, name="attn_bias")

    def score(b: tirx.Expr, h: tirx.Expr, m: tirx.Expr, s: tirx.Expr) -> tirx.Expr:
        scaled = products[b, h, m, s] * tirx.const(scale, "float32")
        if added is not None:
            at = [0 if one else i for one, i in zip(ones, (b, h, m), strict=False)]
            return scaled + added[(*at, s)]
        return scaled if wide == keys else tirx.Select(s < keys, scaled, least)

    scores = te.compute(
        (batch, heads, long, wide),
        score,
        name="attn_scores",
        attrs={TILE: [tile.columns, tile.vectors]},
    )
    outer = (batch, heads, long)
    largest = reduce_rows(lambda i, _, s: scores[(*i, s)], outer, wide, MAX, lanes=lanes)
    powers = te.compute((*outer, wide), lambda *i: exp(scores[i] - largest[i[:-1]]), name="row_exp")
    total = reduce_rows(lambda i, _, s: powers[(*i, s)], outer, wide, SUM, lanes=lanes)
    share = te.compute(outer, lambda *i: tirx.const(1.0, "float32") / total[i], name="row_share")
    weights = te.compute((*outer, wide), lambda *i: powers[i] * share[i[:-1]], name="row_weights")
    s = te.reduce_axis((0, keys), "s")
    sums = te.compute(
        (batch, heads, long, depth),
        lambda b, h, m, d: te.sum(weights[b, h, m, s] * read(value, b, s, h, d), axis=s),
        name="attn_acc",
    )
    return te.compute(
        (batch, rows, heads, depth),
        lambda b, m, h, d: sums[b, h, m, d],
        name="attn_out",
    )


def _heads(bb: relax.BlockBuilder, expr: relax.Expr, operands: list[relax.Expr]) -> Heads:
    """Look through a slice of heads, and give the tensor behind it a position."""
    first, step = 0, 1
    call = bb.lookup_binding(expr) if isinstance(expr, relax.Var) else None
    if isinstance(call, relax.Call) and call.op.same_as(_SLICE):
        axes, begin, _end, *strides = ([int(v) for v in part.fields] for part in call.args[1:])
        if axes == [2]:
            expr, first = call.args[0], begin[0]
            step = strides[0][0] if strides else 1
    for position, operand in enumerate(operands):
        if operand.same_as(expr):
            return Heads(operand=position, first=first, step=step)
    operands.append(expr)
    return Heads(operand=len(operands) - 1, first=first, step=step)


def legalize_attention(machine: Machine, bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize one ``relax.nn.attention`` call. See the module."""
    batch, rows, heads, channels = (int(extent) for extent in call.ty.shape)
    _, keys, key_heads, depth = (int(extent) for extent in call.args[1].ty.shape)
    plain = (
        call.attrs.causal_mask is None
        and call.attrs.window_size is None
        and key_heads == heads
        and all(str(argument.ty.dtype) == "float32" for argument in call.args)
        and fits(machine, rows=rows, keys=keys, depth=depth, channels=channels)
    )
    bias = call.args[3] if len(call.args) > 3 else None
    if not plain or (bias is not None and int(bias.ty.shape[-1]) != keys):
        return default_legalization(bb, call)
    operands: list[relax.Expr] = []
    query, key, value = (_heads(bb, argument, operands) for argument in call.args[:3])
    if bias is not None:
        operands.append(bias)
    scale = call.attrs.scale
    return bb.call_te(
        partial(
            attention,
            query=query,
            key=key,
            value=value,
            bias=None if bias is None else len(operands) - 1,
            shape=(batch, rows, keys, heads, depth),
            scale=1 / math.sqrt(depth) if scale is None else float(scale),
            tile=choose_rows(machine, rows=rows, keys=keys, depth=depth),
            lanes=machine.lanes,
        ),
        *operands,
        primfunc_name_hint="attention",
        primfunc_attrs=ANCHOR,
    )
