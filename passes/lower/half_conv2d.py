"""Lowers convolutions of bfloat16 to sums of pairs, weights ``[K / tk, R, S, C / 2, tk, 2]``.

Rewrites ``relax.nn.conv2d`` in NHWC/OHWI of 16-bit floats with a float32 result and constant
weights. A pair of channels is one int32 word, as large as a float32, so that the float template
schedules it. An image in NCHW (a network's input) is read plane by plane, and two neighbouring taps
of a row are a pair. Without an instruction for pairs the weights are widened in registers, the data
once for each task. Layers that are large enough for AMX are left to `half_tiles`. Runs before
fusion. Numerics: products of 16-bit floats, sums in float32.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from hone.targets.schedule.contraction import PLAIN_ROWS
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.tile_model import choose_tile, chunk_of
from hone.targets.schedule.weight_chunks import WHOLE

from .anchors import ANCHOR, through_layout_change
from .conv2d import chunk_note, legalize_conv2d
from .half import PAIR, Pairs, rounded_source, words
from .half_tiles import lower_conv2d
from .known_scale import KnownScale
from .window import Window
from .winograd import choose_transform, winograd_conv2d, winograd_cycles_of
from .winograd_transforms import Transform
from .winograd_weights import transform_weight


def pack_conv2d(weight: np.ndarray, tile: int) -> np.ndarray:
    """Pack ``[K, R, S, C]`` 16-bit floats to int32 ``[ceil(K / tile), R, S, ceil(C / 2), tile]``.

    A word holds two neighbours along the last axis; zeros in the rounding.
    """
    channels, taps_h, taps_w, depth = weight.shape
    pairs = -(-depth // PAIR)
    padded = np.zeros((-(-channels // tile) * tile, taps_h, taps_w, pairs * PAIR), weight.dtype)
    padded[:channels, ..., :depth] = weight
    blocked = padded.reshape(-1, tile, taps_h, taps_w, pairs, PAIR)
    return words(np.ascontiguousarray(blocked.transpose(0, 2, 3, 4, 1, 5)))


def _padded(
    pairs: Pairs, data: te.Tensor, window: Window, *, width: int, channels: int
) -> te.Tensor:
    """Return the bits of the padded image ``[N, H, W, C]``, or the data where nothing changes."""
    batch, height, in_width, depth = window.shape
    top, left, bottom, right = window.padding
    width = max(width, in_width + left + right)
    same = not any(window.padding) and (width, channels) == (in_width, depth)
    if same and str(data.dtype) == pairs.dtype:
        return data

    def element(n: tirx.Var, h: tirx.Var, w: tirx.Var, c: tirx.Var) -> tirx.Expr:
        value = pairs.bits(data[n, h - top, w - left, c])
        bounds = [h >= top, h < height + top, w >= left, w < in_width + left]
        if channels > depth:
            bounds.append(c < depth)
        return tirx.if_then_else(tirx.all(*bounds), value, tirx.const(0, "uint16"))

    shape = (batch, height + top + bottom, width, channels)
    return te.compute(shape, element, name="conv_pad")


def _planes(pairs: Pairs, data: te.Tensor, window: Window, *, width: int) -> te.Tensor:
    """Return the bits of the padded planes ``[N, C, H, W]`` of an image in NCHW."""
    batch, height, in_width, depth = window.shape
    top, left, bottom, right = window.padding
    width = max(width, in_width + left + right)

    def element(n: tirx.Var, c: tirx.Var, h: tirx.Var, w: tirx.Var) -> tirx.Expr:
        value = pairs.bits(data[n, c, h - top, w - left])
        # Each bound by itself, marked likely, is what loop partitioning understands.
        zero = tirx.const(0, "uint16")
        row = tirx.if_then_else(tirx.likely(w < in_width + left), value, zero)
        row = tirx.if_then_else(tirx.likely(w >= left), row, zero)
        return tirx.if_then_else(tirx.all(h >= top, h < height + top), row, zero)

    shape = (batch, depth, height + top + bottom, width)
    return te.compute(shape, element, name=f"conv_pad{PLAIN_ROWS}")


def by_planes(window: Window) -> bool:
    """Say whether an image in NCHW is read by planes, pairs of taps, where it is in that layout.

    Seven taps of three channels are 12 pairs so, 14 by pairs of channels; a single tap would be
    half of a pair, and twice the products of 64 channels.
    """
    depth, taps_w = window.shape[3], window.taps[1]
    planes, channels = depth * -(-taps_w // PAIR), -(-depth // PAIR) * taps_w
    return window.dilation[1] == 1 and planes <= channels


def conv2d(
    data: te.Tensor,
    weight: te.Tensor,
    *,
    pairs: Pairs,
    window: Window,
    channels: int,
    tile_columns: int,
    channels_first: bool,
    chunk: int = WHOLE,
) -> te.Tensor:
    """Return the float32 convolution of 16-bit floats with weights packed by `pack_conv2d`.

    Parameters
    ----------
    data : te.Tensor
        ``[N, H, W, C]``, or ``[N, C, H, W]`` with ``channels_first``; float32 is rounded first.
    weight : te.Tensor
        int32 ``[ceil(K / tk), R, S, C / 2, tk]``; with ``channels_first`` C, S / 2, R inside.
    pairs : Pairs
        The machine's way to sum them.
    window : Window
        Geometry.
    channels : int
        K.
    tile_columns : int
        The output width is rounded up to it; the extra columns are cut off.
    channels_first : bool
        Pair taps of a plane, not channels.
    chunk : int
        Pairs of one tap that all pixels take before the next ones, or all; a note for the schedule.
    """
    blocks, outer, inner, depth, tile = (int(extent) for extent in weight.shape)
    height, width = window.output
    columns = -(-width // tile_columns) * tile_columns
    taps_w = PAIR * inner if channels_first else window.taps[1]
    needed = (columns - 1) * window.strides[1] + window.dilation[1] * (taps_w - 1) + 1
    if channels_first:
        source = _planes(pairs, data, window, width=needed)
    else:
        needed = needed if columns > width else 0
        source = _padded(pairs, data, window, width=needed, channels=PAIR * depth)
    first, second = te.reduce_axis((0, outer), "r"), te.reduce_axis((0, inner), "s")
    third = te.reduce_axis((0, depth), "c")

    def read(n: tirx.Var, h: tirx.Var, w: tirx.Var, half: int) -> tirx.Expr:
        y, x = h * window.strides[0], w * window.strides[1]
        if channels_first:
            return source[n, first, y + third * window.dilation[0], x + PAIR * second + half]
        y, x = y + first * window.dilation[0], x + second * window.dilation[1]
        return source[n, y, x, PAIR * third + half]

    sums = te.compute(
        (window.shape[0], height, columns, blocks * tile),
        lambda n, h, w, k: pairs.sum(
            lambda half: read(n, h, w, half),
            weight[k // tile, first, second, third, k % tile],
            axis=[first, second, third],
        ),
        name="conv_acc",
        attrs=chunk_note(chunk),
    )
    if blocks * tile == channels and columns == width:
        return sums
    return te.compute(
        (window.shape[0], height, width, channels), lambda *i: sums[i], name="conv_cut"
    )


def legalize_half_conv2d(
    machine: Machine,
    compact: bool,
    large_tiles: bool,
    bb: relax.BlockBuilder,
    call: relax.Call,
) -> relax.Expr:
    """Legalize one convolution of 16-bit floats.

    Parameters
    ----------
    machine : Machine
        Decides tiles.
    compact : bool
        Forgo Winograd.
    large_tiles : bool
        Winograd may take F(4x4).
    bb : BlockBuilder
        Of the function.
    call : Call
        ``relax.nn.conv2d``.
    """
    pairs = Pairs.of(machine, str(call.args[1].ty.dtype))
    if pairs is None:
        return legalize_conv2d(machine, compact, KnownScale(()), bb, call)
    data, weight = call.args
    values = weight.value.numpy()
    channels, taps_h, taps_w, _ = values.shape
    window = Window.of(data, (taps_h, taps_w), call.attrs)
    points: dict[str, Any] = {
        "channels": channels,
        "dtype": pairs.dtype,
        "large_tiles": large_tiles,
    }
    # An infinite weight or NaN would spread to outputs that do not read it.
    by_points = not compact and np.isfinite(values).all()
    cycles = winograd_cycles_of(machine, window, **points) if by_points else math.inf
    tiles = lower_conv2d(machine, pairs, bb, data, values, window, winograd_cycles=cycles)
    if tiles is not None:
        return tiles
    transform = choose_transform(machine, window, **points) if by_points else None
    if transform is not None:
        return _winograd(machine, pairs, bb, data, values, window, transform)
    height, width = window.output
    if by_planes(window):
        data, channels_first = through_layout_change(bb, data)
    else:
        channels_first = False
    data = rounded_source(bb, data)
    if channels_first:
        values = values.transpose(0, 3, 1, 2)
    layer = {
        "height": height,
        "width": width,
        "channels": channels,
        "depth": -(-values.shape[3] // PAIR),
        "taps": values.shape[1] * values.shape[2],
    }
    # The loops over a network's first image are in another order, and its weights are few.
    tile = choose_tile(machine, **layer, chunks=not channels_first)
    packed = pack_conv2d(values, tile.vectors * machine.lanes)
    if channels_first:
        # Pairs of a row share words with those of the next pixels: where its steps follow one
        # another LLVM unrolls them, keeps all the words in registers and the sums in memory.
        packed = np.ascontiguousarray(packed.swapaxes(2, 3))
    return bb.call_te(
        partial(
            conv2d,
            pairs=pairs,
            window=window,
            channels=channels,
            tile_columns=tile.columns,
            channels_first=channels_first,
            chunk=WHOLE if channels_first else chunk_of(machine, tile, **layer),
        ),
        data,
        relax.const(packed),
        primfunc_name_hint="conv2d_half",
        primfunc_attrs=ANCHOR,
    )


def _winograd(
    machine: Machine,
    pairs: Pairs,
    bb: relax.BlockBuilder,
    data: relax.Expr,
    weight: np.ndarray,
    window: Window,
    transform: Transform,
) -> relax.Expr:
    channels, _, _, depth = weight.shape
    height, width = window.output
    m = transform.tile
    tiles = window.shape[0] * -(-height // m) * -(-width // m)
    tile = choose_tile(
        machine, height=1, width=tiles, channels=channels, depth=depth // PAIR, taps=1
    )
    points = transform_weight(weight, transform, tile.vectors * machine.lanes)
    *outer, _, pack = points.shape
    packed = words(points.reshape(*outer, depth // PAIR, PAIR, pack).swapaxes(-1, -2))
    return bb.call_te(
        partial(
            winograd_conv2d,
            window=window,
            transform=transform,
            channels=channels,
            tile_rows=tile.columns,
            pairs=pairs,
        ),
        data,
        relax.const(packed),
        primfunc_name_hint="winograd_conv2d_half",
        primfunc_attrs=ANCHOR,
    )
