"""Lowers NHWC convolutions to TIR with weights packed for the target.

Rewrites ``relax.nn.conv2d`` in NHWC/OHWI with constant weights: dense and grouped ones to weights
``[ceil(K / tk), R, S, C / G, tk]`` with zeros in the rounding, depthwise ones to ``[R, S, C]``,
3x3 ones of stride 1 and 2 to Winograd's forms where those are modelled faster, 1x1 ones to products
of sums (`pairs`) where the machine adds beside multiplying. 16-bit floats are widened as they are
read, data once for each task; see `half_conv2d` for machines that multiply them. Everything else
keeps TVM's own legalization. Runs after the layout is NHWC and before fusion.
Numerics: sums may be taken in another order.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import tvm
from tvm import relax, te, tirx

from hone.targets.schedule.machine import Machine
from hone.targets.schedule.pairs import applies as pairs_apply
from hone.targets.schedule.tile_model import choose_tile, chunk_of
from hone.targets.schedule.weight_chunks import CHUNK, WHOLE
from hone.targets.schedule.winograd_model import Form, tile_rows

from . import pairs, strided_winograd
from .anchors import (
    ANCHOR,
    DEPTHWISE,
    POINTWISE,
    ROLE,
    default_legalization,
    through_layout_change,
)
from .half import is_half, widen, widened_source
from .known_scale import KnownScale
from .window import Window as Window
from .winograd import choose_form, transform_of, winograd_conv2d
from .winograd_transforms import Transform
from .winograd_weights import transform_rows, transform_weight


def pad(
    data: te.Tensor,
    window: Window,
    *,
    name: str,
    value: tirx.Expr,
    width: int | None = None,
    channels_first: bool = False,
    likely: bool = False,
) -> te.Tensor:
    """Return the padded NHWC input of a window, or the input itself where nothing is padded.

    16-bit floats become float32.

    Parameters
    ----------
    data : te.Tensor
        ``[N, H, W, C]``, or ``[N, C, H, W]`` with ``channels_first``.
    window : Window
        Says how much.
    name : str
        Of the stage.
    value : tirx.Expr
        What stands in the padding.
    width : int, optional
        Padded width, where it is more than the window asks for.
    channels_first : bool
        Read NCHW and write NHWC.
    likely : bool
        Mark the bounds, so that loop partitioning frees the inner tiles of them.
    """
    batch, height, in_width, channels = window.shape
    top, left, bottom, right = window.padding
    padded_width = max(width or 0, in_width + left + right)
    inside_only = not any(window.padding) and padded_width == in_width
    if inside_only and not channels_first and not is_half(data):
        return data

    def read(n: tirx.Var, h: tirx.Expr, w: tirx.Expr, c: tirx.Var) -> tirx.Expr:
        return widen(data[n, c, h, w] if channels_first else data[n, h, w, c])

    def element(n: tirx.Var, h: tirx.Var, w: tirx.Var, c: tirx.Var) -> tirx.Expr:
        if inside_only:
            return read(n, h, w, c)
        inside = tirx.all(h >= top, h < height + top, w >= left, w < in_width + left)
        if likely:
            inside = tirx.likely(inside)
        return tirx.if_then_else(inside, read(n, h - top, w - left, c), value)

    return te.compute((batch, height + top + bottom, padded_width, channels), element, name=name)


def conv2d(
    data: te.Tensor,
    weight: te.Tensor,
    window: Window,
    *,
    channels: int,
    tile_columns: int,
    channels_first: bool,
    groups: int = 1,
    chunk: int = WHOLE,
) -> te.Tensor:
    """Return the convolution of NHWC data with packed weights.

    Parameters
    ----------
    data : te.Tensor
        ``[N, H, W, C]``, or ``[N, C, H, W]`` with ``channels_first``.
    weight : te.Tensor
        ``[ceil(K / tk), R, S, C / G, tk]``; with groups, tk divides ``K / G``.
    window : Window
        Geometry.
    channels : int
        K.
    tile_columns : int
        The output width is rounded up to it; the extra columns read zeros and are cut off.
    channels_first : bool
        Read NCHW data directly, which swallows the layout change of a network's input.
    groups : int
        G; a tile of output channels lies in one group.
    chunk : int
        Input channels of one tap that all pixels take before the next ones, or all; a note for the
        schedule.
    """
    blocks, taps_h, taps_w, depth, tile = (int(extent) for extent in weight.shape)
    height, width = window.output
    rounded = -(-width // tile_columns) * tile_columns
    needed = (rounded - 1) * window.strides[1] + window.dilation[1] * (taps_w - 1) + 1
    padded = pad(
        data,
        window,
        name="conv_pad",
        value=tirx.const(0, "float32"),
        width=needed if rounded > width else None,
        channels_first=channels_first,
    )
    r = te.reduce_axis((0, taps_h), "r")
    s = te.reduce_axis((0, taps_w), "s")
    c = te.reduce_axis((0, depth), "c")

    def channel(k: tirx.Var) -> tirx.Expr:
        return c if groups == 1 else tirx.indexdiv(k, channels // groups) * depth + c

    sums = te.compute(
        (window.shape[0], height, rounded, blocks * tile),
        lambda n, h, w, k: te.sum(
            padded[
                n,
                h * window.strides[0] + r * window.dilation[0],
                w * window.strides[1] + s * window.dilation[1],
                channel(k),
            ]
            * widen(weight[k // tile, r, s, c, k % tile]),
            axis=[r, s, c],
        ),
        name="conv_acc",
        attrs=chunk_note(chunk),
    )
    if blocks * tile == channels and rounded == width:
        return sums
    return te.compute(
        (window.shape[0], height, width, channels), lambda *i: sums[i], name="conv_cut"
    )


def chunk_note(chunk: int) -> dict[str, int]:
    """Return the attributes of a sum whose weights are read in chunks."""
    return {} if chunk == WHOLE else {CHUNK: chunk}


def depthwise_conv2d(data: te.Tensor, weight: te.Tensor, window: Window) -> te.Tensor:
    """Return the depthwise convolution of ``[N, H, W, C]`` with ``[R, S, C]``."""
    taps_h, taps_w, channels = (int(extent) for extent in weight.shape)
    padded = pad(data, window, name="dw_pad", value=tirx.const(0, "float32"), likely=True)
    r, s = te.reduce_axis((0, taps_h), "r"), te.reduce_axis((0, taps_w), "s")
    return te.compute(
        (window.shape[0], *window.output, channels),
        lambda n, h, w, c: te.sum(
            padded[
                n,
                h * window.strides[0] + r * window.dilation[0],
                w * window.strides[1] + s * window.dilation[1],
                c,
            ]
            * weight[r, s, c],
            axis=[r, s],
        ),
        name="dw_acc",
    )


def pack_conv2d_weight(weight: np.ndarray, tile: int) -> np.ndarray:
    """Pack ``[K, R, S, C]`` to ``[ceil(K / tile), R, S, C, tile]`` with zeros in the rounding."""
    channels, taps_h, taps_w, depth = weight.shape
    rounded = -(-channels // tile) * tile
    padded = np.zeros((rounded, taps_h, taps_w, depth), weight.dtype)
    padded[:channels] = weight
    blocked = padded.reshape(rounded // tile, tile, taps_h, taps_w, depth)
    return np.ascontiguousarray(blocked.transpose(0, 2, 3, 4, 1))


def grouped_tile(
    machine: Machine, window: Window, *, group: int, depth: int, taps: int
) -> tuple[int, int]:
    """Return how many output channels a grouped convolution packs together, and columns of a tile.

    The widest vectors that divide a group of ``group`` output channels, then as many of them as fit
    the registers.
    """
    height, width = window.output
    chosen = choose_tile(
        machine, height=height, width=width, channels=group, depth=depth, taps=taps
    )
    lanes = math.gcd(group, machine.lanes)
    most = max(chosen.vectors, machine.accumulators // 2 if lanes == 1 else 1)
    vectors = max(v for v in range(1, most + 1) if group // lanes % v == 0)
    return vectors * lanes, chosen.columns


def _winograd(
    machine: Machine,
    bb: relax.BlockBuilder,
    data: relax.Expr,
    weight: np.ndarray,
    window: Window,
    form: Form,
    transform: Transform,
) -> relax.Expr:
    channels, _, _, depth = weight.shape
    height, width = window.output
    m = form.tile
    tiles = window.shape[0] * -(-height // m) * -(-width // m)
    if form.rows:
        at_once = tile_rows(machine, form, tiles)
        packed = transform_rows(weight, transform, machine.lanes)
    else:
        tile = choose_tile(machine, height=1, width=tiles, channels=channels, depth=depth, taps=1)
        at_once = tile.columns
        packed = transform_weight(weight, transform, tile.vectors * machine.lanes)
    return bb.call_te(
        partial(
            winograd_conv2d,
            window=window,
            transform=transform,
            channels=channels,
            tile_rows=at_once,
            rows=form.rows,
        ),
        data,
        relax.const(packed),
        primfunc_name_hint="winograd_conv2d",
        primfunc_attrs=ANCHOR,
    )


def _grouped(
    machine: Machine,
    bb: relax.BlockBuilder,
    data: relax.Expr,
    weight: np.ndarray,
    window: Window,
    *,
    groups: int,
) -> relax.Expr:
    channels, taps_h, taps_w, depth = weight.shape
    tile, columns = grouped_tile(
        machine, window, group=channels // groups, depth=depth, taps=taps_h * taps_w
    )
    packed = pack_conv2d_weight(weight, tile)
    return bb.call_te(
        partial(
            conv2d,
            window=window,
            channels=channels,
            tile_columns=columns,
            channels_first=False,
            groups=groups,
        ),
        data,
        relax.const(packed),
        primfunc_name_hint="grouped_conv2d",
        primfunc_attrs=ANCHOR,
    )


def legalize_conv2d(
    machine: Machine,
    compact: bool,
    scaled: KnownScale,
    bb: relax.BlockBuilder,
    call: relax.Call,
) -> relax.Expr:
    """Legalize one ``relax.nn.conv2d`` call for the machine; ``compact`` forgoes Winograd."""
    attrs = call.attrs
    data, weight = call.args
    fits = (
        attrs.data_layout == "NHWC"
        and attrs.kernel_layout == "OHWI"
        and attrs.out_layout in ("", "NHWC")
        and isinstance(weight, tvm.ir.GenericConst)
        and str(call.ty.dtype) == "float32"
        and (str(data.ty.dtype) == "float32" or is_half(data))
    )
    if not fits:
        return default_legalization(bb, call)
    data = widened_source(bb, data)
    values = weight.value.numpy()
    channels, taps_h, taps_w, depth = values.shape
    window = Window.of(data, (taps_h, taps_w), attrs)
    if int(attrs.groups) == 1:
        height, width = window.output
        layer = {
            "height": height,
            "width": width,
            "channels": channels,
            "depth": depth,
            "taps": taps_h * taps_w,
        }
        dtype = str(weight.ty.dtype)
        # An infinite weight or NaN would spread to outputs that do not read it.
        finite = bool(np.isfinite(values).all())
        if finite and not compact:
            form = choose_form(
                machine, window, channels=channels, dtype=dtype, rows=dtype == "float32"
            )
            transform = transform_of(form, dtype)
            if transform is not None:
                return _winograd(machine, bb, data, values, window, form, transform)
        by_phases = finite and dtype == "float32"
        if by_phases and strided_winograd.applies(machine, window, channels=channels):
            packed = pack_conv2d_weight(values, strided_winograd.pack_width(machine, channels))
            return strided_winograd.lower_conv2d(bb, data, packed, window, channels=channels)
        data, channels_first = through_layout_change(bb, data)
        single = dtype == "float32" and not is_half(data)
        in_place = window.is_pointwise and single and not channels_first
        area = {"height": height, "width": width, "channels": channels, "depth": depth}
        if in_place and finite and weight in scaled and pairs_apply(machine, **area):
            weights = values[:, 0, 0, :].T
            return pairs.lower_product(machine, bb, data, weights, name="pairs_conv2d")
        tile = choose_tile(machine, **layer, chunks=True)
        pack = tile.vectors * machine.lanes
        pointwise = (
            window.is_pointwise
            and channels % pack == 0
            and width % tile.columns == 0
            and not channels_first
            and not is_half(data)
        )
        return bb.call_te(
            partial(
                conv2d,
                window=window,
                channels=channels,
                tile_columns=tile.columns,
                channels_first=channels_first,
                chunk=chunk_of(machine, tile, **layer),
            ),
            data,
            relax.const(pack_conv2d_weight(values, pack)),
            primfunc_name_hint="conv2d",
            primfunc_attrs={**ANCHOR, ROLE: POINTWISE} if pointwise else ANCHOR,
        )
    if int(attrs.groups) == window.shape[3] == channels and depth == 1:
        packed = np.ascontiguousarray(values[..., 0].transpose(1, 2, 0))
        return bb.call_te(
            partial(depthwise_conv2d, window=window),
            data,
            relax.const(packed),
            primfunc_name_hint="depthwise_conv2d",
            primfunc_attrs={**ANCHOR, ROLE: DEPTHWISE},
        )
    return _grouped(machine, bb, data, values, window, groups=int(attrs.groups))
