"""Lowers convolutions with computed weights to the kernels of constant ones, packed at run time.

Rewrites ``relax.nn.conv2d`` in NHWC/OHWI and float32 whose weights are the result of other
operators: a kernel of its own puts them in the order in which the template reads them (see
`conv2d`). No Winograd: what its transform of the weights costs would come back at each run. Runs
before fusion. Numerics: sums may be taken in another order.
"""

from __future__ import annotations

from functools import partial

from tvm import relax, te, tirx

from hone.passes.graph.dataflow import shape_of
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.tile_model import choose_tile

from .anchors import ANCHOR, default_legalization, is_constant, through_layout_change
from .conv2d import Window, conv2d, depthwise_conv2d, grouped_tile


def pack(weight: te.Tensor, *, tile: int, channels_first: bool) -> te.Tensor:
    """Return weights ``[K, R, S, C]`` as ``[ceil(K / tile), R, S, C, tile]``.

    Zeros stand in the rounding; with ``channels_first`` the weights are ``[K, C, R, S]``.
    """
    channels, taps_h, taps_w, depth = _shape(weight, channels_first)
    blocks = -(-channels // tile)

    def element(b: tirx.Var, r: tirx.Var, s: tirx.Var, c: tirx.Var, k: tirx.Var) -> tirx.Expr:
        at = b * tile + k
        value = weight[at, c, r, s] if channels_first else weight[at, r, s, c]
        if blocks * tile == channels:
            return value
        return tirx.if_then_else(at < channels, value, tirx.const(0, weight.dtype))

    return te.compute((blocks, taps_h, taps_w, depth, tile), element, name="pack")


def pack_depthwise(weight: te.Tensor, *, channels_first: bool) -> te.Tensor:
    """Return weights ``[C, R, S, 1]``, or ``[C, 1, R, S]``, as ``[R, S, C]``."""
    channels, taps_h, taps_w, _ = _shape(weight, channels_first)

    def element(r: tirx.Var, s: tirx.Var, c: tirx.Var) -> tirx.Expr:
        return weight[c, 0, r, s] if channels_first else weight[c, r, s, 0]

    return te.compute((taps_h, taps_w, channels), element, name="pack")


def _shape(weight: te.Tensor, channels_first: bool) -> tuple[int, ...]:
    shape = tuple(int(extent) for extent in weight.shape)
    return (shape[0], *shape[2:], shape[1]) if channels_first else shape


def legalize_computed_conv2d(
    machine: Machine, bb: relax.BlockBuilder, call: relax.Call
) -> relax.Expr:
    """Legalize one ``relax.nn.conv2d`` call whose weights are not constant. See the module."""
    attrs = call.attrs
    data, weight = call.args
    fits = (
        attrs.data_layout == "NHWC"
        and attrs.kernel_layout == "OHWI"
        and attrs.out_layout in ("", "NHWC")
        and not is_constant(weight)
        and str(call.ty.dtype) == str(data.ty.dtype) == str(weight.ty.dtype) == "float32"
    )
    if not fits:
        return default_legalization(bb, call)
    channels, taps_h, taps_w, depth = shape_of(weight)
    window = Window.of(data, (taps_h, taps_w), attrs)
    groups = int(attrs.groups)
    source, first = through_layout_change(bb, weight)
    if groups == window.shape[3] == channels and depth == 1:
        packed = bb.call_te(
            partial(pack_depthwise, channels_first=first), source, primfunc_name_hint="pack"
        )
        return bb.call_te(
            partial(depthwise_conv2d, window=window),
            data,
            bb.emit(packed),
            primfunc_name_hint="depthwise_conv2d",
            primfunc_attrs=ANCHOR,
        )
    height, width = window.output
    if groups == 1:
        chosen = choose_tile(
            machine,
            height=height,
            width=width,
            channels=channels,
            depth=depth,
            taps=taps_h * taps_w,
        )
        tile, columns = chosen.vectors * machine.lanes, chosen.columns
    else:
        tile, columns = grouped_tile(
            machine, window, group=channels // groups, depth=depth, taps=taps_h * taps_w
        )
    packed = bb.call_te(
        partial(pack, tile=tile, channels_first=first), source, primfunc_name_hint="pack"
    )
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
        bb.emit(packed),
        primfunc_name_hint="conv2d" if groups == 1 else "grouped_conv2d",
        primfunc_attrs=ANCHOR,
    )
