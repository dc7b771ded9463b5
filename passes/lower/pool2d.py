"""Lowers NHWC max pooling to a window maximum whose padding is never copied.

Rewrites ``relax.nn.max_pool2d`` in NHWC without ceil mode; everything else keeps TVM's own
legalization. Runs after the layout is NHWC and before fusion. Numerics: exact.
"""

from __future__ import annotations

from functools import partial

from tvm import relax, te, tirx

from .anchors import ANCHOR, default_legalization
from .conv2d import Window, pad
from .half import is_half, widened_source


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


def legalize_max_pool2d(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize one ``relax.nn.max_pool2d`` call. See the module."""
    attrs, data = call.attrs, widened_source(bb, call.args[0])
    if attrs.layout != "NHWC" or attrs.out_layout not in ("", "NHWC") or attrs.ceil_mode:
        return default_legalization(bb, call)
    window = Window.of(data, attrs.pool_size, attrs)
    return bb.call_te(
        partial(max_pool2d, window=window),
        data,
        primfunc_name_hint="max_pool2d",
        primfunc_attrs=ANCHOR,
    )
