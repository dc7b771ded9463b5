"""Lowers attention to one TIR function in which the scores of a few rows exist at a time.

Rewrites ``hone.attention``, ``softmax(Q K^T scale + bias) V`` with scores that may be covered or
left out. A block of rows takes its products with a block of keys, their softmax and the products
with the values without leaving the core's cache, see `attention_kernel`; the keys are transposed
once for each head. Heads that are a slice of a wider tensor are read where they lie, and several
heads of queries may share one of keys. Runs at legalization. Numerics: sums may be taken in another
order, and the scale is applied to the keys; for exp see `elementary`.
"""

from __future__ import annotations

from functools import partial

from tvm import relax
from tvm.ir import Op

from hone.targets.schedule.machine import Machine
from hone.targets.schedule.tile_model import Tile, choose_tile

from .anchors import ANCHOR
from .attention_kernel import AttentionKernel, Blocks, Heads
from .attention_operator import Attention

_SLICE = Op.get("relax.strided_slice")
# The share of a core's L2 that a block of scores may fill.
SCORES_SHARE = 0.5
# Rows of a register tile that are enough: 4 x 4 took 36.0 us where cores were near, 50.4 where they
# were far, 8 x 2 took 35.8 and 46.7 (BERT-mini).
TALL = 8
# Each block of keys has code of its own.
MOST_BLOCKS = 16


def _taller(tile: Tile, rows: int) -> Tile:
    """Return a tile of as many sums with up to `TALL` rows, where these cut no more rows off.

    Every block of rows reads all keys and values, for which the model of tiles has no term.
    """
    while tile.vectors % 2 == 0 and tile.columns * 2 <= TALL and rows % (tile.columns * 2) == 0:
        tile = Tile(rows=1, columns=tile.columns * 2, vectors=tile.vectors // 2)
    return tile


def choose_blocks(
    machine: Machine, *, rows: int, keys: int, depth: int, channels: int
) -> Blocks | None:
    """Choose how attention is cut, None where there would be too many blocks of keys.

    Parameters
    ----------
    machine : Machine
        Registers, lanes and caches. A block of scores fits `SCORES_SHARE` of L2.
    rows, keys, depth, channels : int
        Of the queries, of keys and values, of queries and keys, of values.
    """
    tile = _taller(
        choose_tile(machine, height=1, width=rows, channels=keys, depth=depth, taps=1), rows
    )
    width = tile.vectors * machine.lanes
    tiles = -(-keys // width)
    most = int(machine.l2_bytes * SCORES_SHARE) // (tile.columns * width * 4)
    count = -(-tiles // max(most, 1))
    if count > MOST_BLOCKS:
        return None
    vector = min(machine.lanes, max(1 << (channels - 1).bit_length(), 4))
    return Blocks(
        tile=tile,
        keys=-(-tiles // count) * width,
        count=count,
        channels=-(-channels // vector) * vector,
        lanes=machine.lanes,
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
    """Legalize one call of ``hone.attention``. See the module."""
    found = Attention.of(call)
    batch, rows, heads, depth = (int(extent) for extent in call.args[0].ty.shape)
    _, keys, key_heads, channels = (int(extent) for extent in call.args[2].ty.shape)
    blocks = choose_blocks(machine, rows=rows, keys=keys, depth=depth, channels=channels)
    if blocks is None:
        raise RuntimeError(f"attention over {keys} keys was checked to have a kernel, and has none")
    operands: list[relax.Expr] = []
    query, key, value = (_heads(bb, argument, operands) for argument in call.args[:3])
    masks: dict[str, int | None] = {"bias": None, "cover": None}
    for name, mask in (("bias", found.bias), ("cover", found.cover)):
        if mask is not None:
            masks[name] = len(operands)
            operands.append(mask)
    kernel = AttentionKernel(
        query=query,
        key=key,
        value=value,
        bias=masks["bias"],
        cover=masks["cover"],
        fill=found.fill,
        cover_first=found.cover_first,
        causal=found.causal,
        batch=batch,
        rows=rows,
        keys=keys,
        heads=heads,
        depth=depth,
        channels=channels,
        shared=heads // key_heads,
        scale=found.scale,
        cap=found.cap,
        blocks=blocks,
    )
    return bb.call_te(
        partial(kernel),
        *operands,
        primfunc_name_hint="attention",
        primfunc_attrs=ANCHOR,
    )
