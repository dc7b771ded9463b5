"""Lowers 2-D pooling to window maxima and sums over NHWC whose padding is never copied.

Rewrites ``relax.nn.max_pool2d`` and ``relax.nn.avg_pool2d`` in NHWC; in NCHW along the rows of each
image (`hone.passes.lower.pool_planes`), or between two transpositions where rows are short. Average
pooling in ceil mode keeps TVM's own legalization, as does what is no float32. Runs after the
layout is NHWC and before fusion. Numerics: maxima are exact, a NaN may be passed over; sums may be
taken in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tvm import relax, te, tirx

from .anchors import ANCHOR, default_legalization
from .conv2d import Window, pad
from .half import is_half, widened_source
from .pool_planes import avg_pool_planes, fits_planes, max_pool_planes

_LAST, _FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def max_pool2d(data: te.Tensor, window: Window) -> te.Tensor:
    """Return the window maximum of ``[N, H, W, C]``."""
    dtype = "float32" if is_half(data) else data.dtype
    padded = pad(data, window, name="dw_pad", value=tirx.min_value(dtype), likely=True)
    r, s = te.reduce_axis((0, window.taps[0]), "r"), te.reduce_axis((0, window.taps[1]), "s")
    return te.compute(
        (window.shape[0], *window.output, window.shape[3]),
        lambda n, h, w, c: te.max(
            padded[
                n,
                h * window.strides[0] + r * window.dilation[0],
                w * window.strides[1] + s * window.dilation[1],
                c,
            ],
            axis=[r, s],
        ),
        name="dw_acc",
    )


def avg_pool2d(data: te.Tensor, window: Window, *, padding_counts: bool) -> te.Tensor:
    """Return the window mean of ``[N, H, W, C]``; padding is part of a window, or is not."""
    padded = pad(data, window, name="dw_pad", value=tirx.const(0, "float32"), likely=True)
    r, s = te.reduce_axis((0, window.taps[0]), "r"), te.reduce_axis((0, window.taps[1]), "s")
    sums = te.compute(
        (window.shape[0], *window.output, window.shape[3]),
        lambda n, h, w, c: te.sum(
            padded[
                n,
                h * window.strides[0] + r * window.dilation[0],
                w * window.strides[1] + s * window.dilation[1],
                c,
            ],
            axis=[r, s],
        ),
        name="dw_acc",
    )
    size = window.taps[0] * window.taps[1]

    def taps(at: tirx.Var, axis: int) -> tirx.Expr:
        """Return how many taps of a window lie in the image along an axis."""
        first = at * window.strides[axis] - window.padding[axis]
        end = tirx.min(first + window.taps[axis], window.shape[1 + axis])
        return end - tirx.max(first, 0)

    def mean(n: tirx.Var, h: tirx.Var, w: tirx.Var, c: tirx.Var) -> tirx.Expr:
        if padding_counts or not any(window.padding):
            return sums[n, h, w, c] * tirx.const(1 / size, "float32")
        return sums[n, h, w, c] / (taps(h, 0) * taps(w, 1)).astype("float32")

    return te.compute(sums.shape, mean, name="dw_mean")


def _whole(window: Window, output: tuple[int, int]) -> Window:
    """Return a window padded at the end so far that it gives an output in ceil mode."""
    spans = [d * (t - 1) + 1 for d, t in zip(window.dilation, window.taps, strict=True)]
    top, left, bottom, right = window.padding
    ends = [
        max((count - 1) * stride + span - before - size, after)
        for count, stride, span, before, size, after in zip(
            output,
            window.strides,
            spans,
            (top, left),
            window.shape[1:3],
            (bottom, right),
            strict=True,
        )
    ]
    return replace(window, padding=(top, left, *ends))


def legalize_max_pool2d(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize one ``relax.nn.max_pool2d`` call. See the module."""
    return _lower(bb, call, nhwc=max_pool2d, nchw=max_pool_planes, name="max_pool2d")


def legalize_avg_pool2d(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize one ``relax.nn.avg_pool2d`` call. See the module."""
    attrs = call.attrs
    fits = str(call.ty.dtype) == "float32" == str(call.args[0].ty.dtype)
    if attrs.ceil_mode or not fits or [int(d) for d in attrs.dilation] != [1, 1]:
        return default_legalization(bb, call)
    counts = bool(attrs.count_include_pad)
    return _lower(
        bb,
        call,
        nhwc=partial(avg_pool2d, padding_counts=counts),
        nchw=partial(avg_pool_planes, padding_counts=counts),
        name="avg_pool2d",
    )


def _lower(
    bb: relax.BlockBuilder,
    call: relax.Call,
    *,
    nhwc: Callable[..., te.Tensor],
    nchw: Callable[..., te.Tensor],
    name: str,
) -> relax.Expr:
    """Lower a pooling call in its layout, or over NHWC between two transpositions."""
    layout, data = str(call.attrs.layout), widened_source(bb, call.args[0])
    if layout not in ("NHWC", "NCHW") or str(call.attrs.out_layout) not in ("", layout):
        return default_legalization(bb, call)
    shape = [int(extent) for extent in call.ty.shape]
    output = (shape[1], shape[2]) if layout == "NHWC" else (shape[2], shape[3])
    extents = [int(extent) for extent in data.ty.shape]
    if layout == "NCHW":
        extents = [extents[axis] for axis in _LAST]
    window = _whole(Window.of_shape(extents, call.attrs.pool_size, call.attrs), output)

    def emit(make: Callable[..., te.Tensor], given: relax.Expr) -> relax.Expr:
        made = partial(make, window=window)
        return bb.call_te(made, given, primfunc_name_hint=name, primfunc_attrs=ANCHOR)

    if layout == "NHWC":
        return emit(nhwc, data)
    if fits_planes(window):
        return emit(nchw, data)
    moved = bb.emit(relax.op.permute_dims(data, _LAST))
    return relax.op.permute_dims(bb.emit(emit(nhwc, moved)), _FIRST)
