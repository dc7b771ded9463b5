"""Tensor expressions of kernels that decode their weights.

Stages of a matrix product: ``wonly_pad`` (rows filled up to whole words, and scaled for fields),
``wonly_fields``, ``wonly_offset`` and ``wonly_total`` (sums of the activations), ``wgroup_part``
(the sum of one group) and ``wgroup_acc``, or ``wonly_acc``; of a convolution ``conv_pad`` and
``conv_acc``. Numerics: with fields, an activation below 2^-96 may count as 0, and an infinite one
makes the result NaN where it may have been infinite.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import te, tirx

from .weight_words import Words, scale_value
from .window import Window

# From this many rows on, a decoded weight vector serves enough of them to be scaled right away;
# below, sums of a group are scaled instead.
SCALED_ROWS = 4


def scales_sums(rows: int, groups: int) -> bool:
    """Say whether a matrix product scales the sums of its groups, and not each weight."""
    return groups == 1 or rows < SCALED_ROWS


def dense(
    data: te.Tensor,
    packed: te.Tensor,
    scale: te.Tensor,
    *zero_point: te.Tensor,
    words: Words,
    channels: int,
    tile_rows: int,
) -> te.Tensor:
    """Return ``[M, C] x packed [ceil(K / tk), G × words, tk]`` as ``[M, K]``.

    Parameters
    ----------
    data : te.Tensor
        float32 ``[M, C]``.
    packed, scale, zero_point : te.Tensor
        See `hone.passes.lower.weight_words.Packed`.
    words : Words
        A run is a group.
    channels : int
        K.
    tile_rows : int
        As for `hone.passes.lower.dense.dense`.
    """
    rows = int(data.shape[0])
    blocks, groups, tile = (int(extent) for extent in scale.shape)
    if not scales_sums(rows, groups):
        return _dense_of_scaled(
            data, packed, scale, *zero_point, words=words, channels=channels, tile_rows=tile_rows
        )
    run, held = words.rounded, words.held
    row, shape = _tile(rows, tile_rows, blocks * tile)
    filled = _filled_rows(data, words, groups)
    signs = words.fields and words.bits == 1
    corrections = _corrections(
        data, words, (shape[0], groups), row=row, centred=not (zero_point or signs)
    )

    def level(k: tirx.Var, c: tirx.Expr) -> tirx.Expr:
        read = words.field if words.fields else words.level
        return read(packed[k // tile, c // held, k % tile], c % held)

    def scaled(sums: tirx.Expr, m: tirx.Expr, k: tirx.Var, group: tirx.Expr | int) -> tirx.Expr:
        """Return the sum of a group with what corrects it, in the weights' scale."""
        if signs:
            sums = (sums + corrections[0][m, group]) * tirx.const(2, "float32") + corrections[1][
                m, group
            ]
        elif len(corrections) == 2:
            zero = tirx.Cast("float32", zero_point[0][k // tile, group, k % tile])
            sums = sums + (corrections[0][m, group] - zero * corrections[1][m, group])
        elif corrections:
            sums = sums + corrections[0][m, group]
        return sums * scale_value(scale[k // tile, group, k % tile])

    c = _steps(run)
    g = te.reduce_axis((0, groups), "g")
    parts = te.compute(
        (*shape, groups),
        lambda m, k, g: te.sum(filled[row(m), g * run + c] * level(k, g * run + c), axis=c),
        name="wgroup_part",
    )
    sums = te.compute(
        shape,
        lambda m, k: te.sum(scaled(parts[m, k, g], m, k, g), axis=g),
        name="wgroup_acc",
    )
    return _cut(sums, rows, channels)


def _dense_of_scaled(
    data: te.Tensor,
    packed: te.Tensor,
    scale: te.Tensor,
    *zero_point: te.Tensor,
    words: Words,
    channels: int,
    tile_rows: int,
) -> te.Tensor:
    """Return `dense` with every weight scaled as it is decoded, for many rows and groups."""
    rows = int(data.shape[0])
    blocks, groups, tile = (int(extent) for extent in scale.shape)
    run, held = words.rounded, words.held
    row, shape = _tile(rows, tile_rows, blocks * tile)
    filled = _filled_rows(data, words, groups)
    c = _steps(groups * run)

    def weight(k: tirx.Var) -> tirx.Expr:
        value = words.level(packed[k // tile, c // held, k % tile], c % held)
        if zero_point:
            value = value - tirx.Cast("float32", zero_point[0][k // tile, c // run, k % tile])
        return value * scale_value(scale[k // tile, c // run, k % tile])

    sums = te.compute(
        shape, lambda m, k: te.sum(filled[row(m), c] * weight(k), axis=c), name="wonly_acc"
    )
    return _cut(sums, rows, channels)


def _tile(
    rows: int, tile_rows: int, channels: int
) -> tuple[Callable[[tirx.Var], tirx.Expr], tuple[int, int]]:
    """Return the row that a row of register tiles reads, and the shape of all register tiles."""
    rounded = -(-rows // tile_rows) * tile_rows

    def row(m: tirx.Var) -> tirx.Expr:
        return m if rounded == rows else tirx.min(m, rows - 1)

    return row, (rounded, channels)


def _cut(sums: te.Tensor, rows: int, channels: int) -> te.Tensor:
    """Return the register tiles without what fills up the last ones."""
    if [int(extent) for extent in sums.shape] == [rows, channels]:
        return sums
    return te.compute((rows, channels), lambda *i: sums[i], name="wo_cut")


def _steps(extent: int) -> tirx.IterVar:
    """Return the axis of a sum over levels.

    Its 64 bits keep TVM from widening everything that the narrower index takes part in, the
    shifted words included.
    """
    return te.reduce_axis((tirx.const(0, "int64"), tirx.const(extent, "int64")), "c")


def _value(data: te.Tensor, words: Words, groups: int) -> Callable[..., tirx.Expr]:
    """Return ``(row, place) → activation``; 0 where a run is filled up to whole words."""
    depth, run = int(data.shape[1]), words.rounded
    if groups * run == depth:
        return lambda m, c: data[m, c]

    def value(m: tirx.Expr, c: tirx.Expr) -> tirx.Expr:
        at = c if groups == 1 else tirx.indexdiv(c, run) * words.run + tirx.indexmod(c, run)
        inside = at < depth
        if run != words.run:
            inside = tirx.all(inside, tirx.indexmod(c, run) < words.run)
        return tirx.if_then_else(inside, data[m, at], tirx.const(0, data.dtype))

    return value


def _filled_rows(data: te.Tensor, words: Words, groups: int) -> te.Tensor:
    """Return the rows of a matrix as the sums read them."""
    rows, depth = (int(extent) for extent in data.shape)
    length = groups * words.rounded
    if length == depth and not words.fields:
        return data
    value = _value(data, words, groups)

    def element(m: tirx.Var, c: tirx.Var) -> tirx.Expr:
        c = tirx.Cast("int64", c)
        return value(m, c) * words.share(c % words.held) if words.fields else value(m, c)

    return te.compute((rows, length), element, name="wonly_pad")


def _corrections(
    data: te.Tensor,
    words: Words,
    shape: tuple[int, int],
    *,
    row: Callable[[tirx.Var], tirx.Expr],
    centred: bool,
) -> tuple[te.Tensor, ...]:
    """Return what a row adds to the sum of each group, ``[M, G]``.

    First for the offset of fields, then, unless the levels are ``centred``, the sum of the
    activations that zero points are multiplied with. M are the rows of all register tiles; the
    last of them stand for rows again.
    """
    if centred and not words.fields:
        return ()
    held = words.held
    value = _value(data, words, shape[1])
    w = te.reduce_axis((0, words.rounded // held), "w")
    sums = te.compute(
        (*shape, held),
        lambda m, g, i: te.sum(value(row(m), g * words.rounded + w * held + i), axis=w),
        name="wonly_fields",
    )

    def total(m: tirx.Var, g: tirx.Var) -> tirx.Expr:
        result: tirx.Expr = sums[m, g, 0]
        for place in range(1, held):
            result = result + sums[m, g, place]
        return result

    offset = te.compute(
        shape,
        lambda m, g: (sums[m, g, held - 1] - total(m, g)) * tirx.const(words.offset, "float32"),
        name="wonly_offset",
    )
    return (offset,) if centred else (offset, te.compute(shape, total, name="wonly_total"))


def conv2d(
    data: te.Tensor,
    packed: te.Tensor,
    scale: te.Tensor,
    *zero_point: te.Tensor,
    words: Words,
    window: Window,
    channels: int,
    group: int,
    tile_columns: int,
    channels_first: bool,
) -> te.Tensor:
    """Return the convolution of NHWC data with ``packed [ceil(K / tk), R, S, words, tk]``.

    Parameters
    ----------
    data : te.Tensor
        ``[N, H, W, C]``, or ``[N, C, H, W]`` with ``channels_first``.
    packed, scale, zero_point : te.Tensor
        See `hone.passes.lower.weight_words.Packed`.
    words : Words
        A run is the input channels of one tap.
    window : Window
        Geometry.
    channels : int
        K.
    group : int
        Weights along ``[R, S, C]`` that share a scale.
    tile_columns : int
        As for `hone.passes.lower.conv2d.conv2d`.
    channels_first : bool
        Read NCHW data directly.
    """
    _, taps_h, taps_w, _, tile = (int(extent) for extent in packed.shape)
    blocks, groups, _ = (int(extent) for extent in scale.shape)
    height, width = window.output
    rounded = -(-width // tile_columns) * tile_columns
    needed = (rounded - 1) * window.strides[1] + window.dilation[1] * (taps_w - 1) + 1
    padded = _pad(data, window, words, needed if rounded > width else 0, channels_first)
    depth, held = words.run, words.held
    r = te.reduce_axis((0, taps_h), "r")
    s = te.reduce_axis((0, taps_w), "s")
    c = _steps(words.rounded)

    def group_of() -> tirx.Expr | int:
        if groups == 1:
            return 0
        if depth % group == 0:
            return (r * taps_w + s) * (depth // group) + c // group
        # The levels that fill the last word of a tap are 0, whatever scale they meet.
        return tirx.indexdiv((r * taps_w + s) * depth + tirx.min(c, depth - 1), group)

    def weight(k: tirx.Var) -> tirx.Expr:
        value = words.level(packed[k // tile, r, s, c // held, k % tile], c % held)
        if zero_point:
            value = value - tirx.Cast("float32", zero_point[0][k // tile, group_of(), k % tile])
        return value if groups == 1 else value * factor(k, group_of())

    def factor(k: tirx.Var, at: tirx.Expr | int) -> tirx.Expr:
        return scale_value(scale[k // tile, at, k % tile])

    sums = te.compute(
        (window.shape[0], height, rounded, blocks * tile),
        lambda n, h, w, k: te.sum(
            padded[
                n,
                h * window.strides[0] + r * window.dilation[0],
                w * window.strides[1] + s * window.dilation[1],
                c,
            ]
            * weight(k),
            axis=[r, s, c],
        ),
        name="conv_acc",
    )
    shape = (window.shape[0], height, width, channels)
    if groups == 1:
        return te.compute(shape, lambda *i: sums[i] * factor(i[-1], 0), name="wo_cut")
    if blocks * tile == channels and rounded == width:
        return sums
    return te.compute(shape, lambda *i: sums[i], name="wo_cut")


def _pad(
    data: te.Tensor, window: Window, words: Words, width: int, channels_first: bool
) -> te.Tensor:
    """Return the input of a window with zeros around it and behind its channels."""
    batch, height, in_width, channels = window.shape
    top, left, bottom, right = window.padding
    padded_width = max(width, in_width + left + right)
    shape = (batch, height + top + bottom, padded_width, words.rounded)
    if shape == window.shape and not channels_first:
        return data

    def element(n: tirx.Var, h: tirx.Var, w: tirx.Var, c: tirx.Var) -> tirx.Expr:
        bounds = []
        if top or bottom:
            bounds += [h >= top, h < height + top]
        if padded_width > in_width:
            bounds += [w >= left, w < in_width + left]
        if words.rounded > channels:
            bounds.append(c < channels)
        y, x = h - top, w - left
        value = data[n, c, y, x] if channels_first else data[n, y, x, c]
        if not bounds:
            return value
        return tirx.if_then_else(tirx.all(*bounds), value, tirx.const(0, data.dtype))

    return te.compute(shape, element, name="conv_pad")
