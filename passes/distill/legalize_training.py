"""Turns the operators of a training step into TIR functions, convolutions into fast ones.

Rewrites, after ``Gradient``, what it leaves in NCHW: forward convolutions and their data gradients
become channels-last convolutions with weights packed at run time, which the CPU templates
schedule; weight gradients become a sum that is vectorized over the output channels. Grouped and
odd ones keep TVM's own legalization. Fusion and scheduling follow. Numerics: sums may be taken in
another order.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import tvm
from tvm import relax, te, tirx, topi

from hone.passes.graph.dataflow import shape_of
from hone.passes.lower.anchors import ANCHOR, default_legalization
from hone.passes.lower.conv2d import Window, conv2d, pad
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.tile_model import choose_tile

_NHWC_TO_NCHW = [0, 3, 1, 2]
_NCHW_TO_NHWC = [0, 2, 3, 1]


@tvm.transform.module_pass(opt_level=0)
class LegalizeTraining:
    """Legalize a module with gradients for a CPU.

    Parameters
    ----------
    machine : Machine
        Decides how weights are packed.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with every operator legalized."""
        own = {
            "relax.nn.conv2d": partial(_legalize_conv2d, self._machine),
            "relax.nn.conv2d_transpose": partial(_legalize_data_gradient, self._machine),
            "relax.grad.take_backward": _legalize_take_gradient,
        }
        return relax.transform.LegalizeOps(own)(module)


def _legalize_conv2d(machine: Machine, builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    attrs = call.attrs
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout))
    if int(attrs.groups) != 1:
        return default_legalization(builder, call)
    if layouts == ("CNHW", "IOHW", "CNHW"):
        return _weight_gradient(builder, call)
    if layouts != ("NCHW", "OIHW", "NCHW"):
        return default_legalization(builder, call)
    data, weight = call.args
    channels, _, taps_h, taps_w = shape_of(weight)
    window = _window(data, (taps_h, taps_w), attrs)
    return _convolve(machine, builder, data, weight, window, channels, flipped=False)


def _legalize_data_gradient(
    machine: Machine, builder: relax.BlockBuilder, call: relax.Call
) -> relax.Expr:
    """Convolve the gradient, spread by the strides, with the weights turned around."""
    attrs = call.attrs
    gradient, weight = call.args
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout))
    _, channels, taps_h, taps_w = shape_of(weight)
    dilation = tuple(int(step) for step in attrs.dilation)
    span_h, span_w = dilation[0] * (taps_h - 1), dilation[1] * (taps_w - 1)
    top, left, bottom, right = (int(width) for width in attrs.padding)
    extra_h, extra_w = (int(width) for width in attrs.output_padding)
    padding = (span_h - top, span_w - left, span_h - bottom + extra_h, span_w - right + extra_w)
    if int(attrs.groups) != 1 or layouts != ("NCHW", "IOHW", "NCHW") or min(padding) < 0:
        return default_legalization(builder, call)
    strides = [int(stride) for stride in attrs.strides]
    if strides != [1, 1]:
        spread = partial(topi.nn.dilate, strides=[1, 1, *strides])
        gradient = builder.emit_te(spread, gradient, primfunc_name_hint="spread")
    window = replace(_window(gradient, (taps_h, taps_w), attrs), strides=(1, 1), padding=padding)
    return _convolve(machine, builder, gradient, weight, window, channels, flipped=True)


def _window(data: relax.Expr, taps: tuple[int, int], attrs: tvm.ir.Attrs) -> Window:
    """Return the window over NCHW data."""
    batch, channels, height, width = shape_of(data)
    stride_h, stride_w = (int(stride) for stride in attrs.strides)
    dilation_h, dilation_w = (int(step) for step in attrs.dilation)
    top, left, bottom, right = (int(extent) for extent in attrs.padding)
    return Window(
        shape=(batch, height, width, channels),
        taps=taps,
        strides=(stride_h, stride_w),
        dilation=(dilation_h, dilation_w),
        padding=(top, left, bottom, right),
    )


def _convolve(
    machine: Machine,
    builder: relax.BlockBuilder,
    data: relax.Expr,
    weight: relax.Expr,
    window: Window,
    channels: int,
    *,
    flipped: bool,
) -> relax.Expr:
    """Emit a convolution of NCHW data with OIHW weights (IOHW ones turned around)."""
    height, width = window.output
    tile = choose_tile(
        machine,
        height=height,
        width=width,
        channels=channels,
        depth=window.shape[3],
        taps=window.taps[0] * window.taps[1],
    )
    packed = builder.emit_te(
        partial(_pack, tile=tile.vectors * machine.lanes, flipped=flipped),
        weight,
        primfunc_name_hint="pack_turned" if flipped else "pack",
    )
    result = builder.emit(
        builder.call_te(
            partial(
                conv2d,
                window=window,
                channels=channels,
                tile_columns=tile.columns,
                channels_first=True,
            ),
            data,
            packed,
            primfunc_name_hint="conv2d",
            primfunc_attrs=ANCHOR,
        )
    )
    return relax.op.permute_dims(result, _NHWC_TO_NCHW)


def _pack(weight: te.Tensor, *, tile: int, flipped: bool) -> te.Tensor:
    """Return OIHW weights, or IOHW ones turned around, as ``[ceil(K / tile), R, S, C, tile]``."""
    first, second, taps_h, taps_w = (int(extent) for extent in weight.shape)
    channels, depth = (second, first) if flipped else (first, second)

    def element(
        block: tirx.Var, r: tirx.Var, s: tirx.Var, c: tirx.Var, lane: tirx.Var
    ) -> tirx.Expr:
        k = block * tile + lane
        read = weight[c, k, taps_h - 1 - r, taps_w - 1 - s] if flipped else weight[k, c, r, s]
        return tirx.if_then_else(k < channels, read, tirx.const(0, weight.dtype))

    return te.compute((-(-channels // tile), taps_h, taps_w, depth, tile), element, name="pack")


def _weight_gradient(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Emit ``dw[k, c, r, s] = sum over n, p, q of x[n, c, p + r, q + s] · g[n, k, p, q]``.

    ``Gradient`` writes it as a convolution whose batch is the input channels and whose kernel is
    the output's gradient, so its strides are the forward dilation and the other way round.
    """
    data, gradient = call.args
    attrs = call.attrs
    _, _, taps_h, taps_w = shape_of(call)
    strides = tuple(int(step) for step in attrs.dilation)
    dilation = tuple(int(step) for step in attrs.strides)
    padded = builder.emit_te(
        partial(
            pad,
            window=_window(data, (taps_h, taps_w), attrs),
            name="pad",
            value=tirx.const(0.0, "float32"),
            channels_first=True,
        ),
        data,
        primfunc_name_hint="weight_gradient_pad",
    )
    result = builder.emit_te(
        partial(_correlate, taps=(taps_h, taps_w), strides=strides, dilation=dilation),
        padded,
        builder.emit(relax.op.permute_dims(gradient, _NCHW_TO_NHWC)),
        primfunc_name_hint="weight_gradient",
    )
    return relax.op.permute_dims(result, [3, 2, 0, 1])


def _correlate(
    data: te.Tensor,
    gradient: te.Tensor,
    *,
    taps: tuple[int, int],
    strides: tuple[int, ...],
    dilation: tuple[int, ...],
) -> te.Tensor:
    """Return the weight gradient [R, S, C, K] of padded data [N, H, W, C] and [N, P, Q, K]."""
    depth = int(data.shape[3])
    batch, height, width, channels = (int(extent) for extent in gradient.shape)
    n = te.reduce_axis((0, batch), "n")
    p, q = te.reduce_axis((0, height), "p"), te.reduce_axis((0, width), "q")
    return te.compute(
        (*taps, depth, channels),
        lambda r, s, c, k: te.sum(
            data[n, p * strides[0] + r * dilation[0], q * strides[1] + s * dilation[1], c]
            * gradient[n, p, q, k],
            axis=[n, p, q],
        ),
        name="weight_gradient",
    )


def _legalize_take_gradient(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize the gradient of taking one slice, which TVM's own cannot."""
    gradient, data, index = call.args
    if shape_of(index) or call.attrs.axis is None:
        return default_legalization(builder, call)
    axis = int(call.attrs.axis) % len(shape_of(data))
    spread = partial(_place_slice, shape=shape_of(data), axis=axis)
    return builder.call_te(spread, gradient, index, primfunc_name_hint="take_gradient")


def _place_slice(
    gradient: te.Tensor, index: te.Tensor, *, shape: tuple[int, ...], axis: int
) -> te.Tensor:
    """Return zeros of a shape with the gradient at one position along an axis."""

    def element(*at: tirx.Var) -> tirx.Expr:
        position = index[()].astype("int64")
        position = position + tirx.if_then_else(position < 0, tirx.const(shape[axis], "int64"), 0)
        return tirx.if_then_else(
            at[axis].astype("int64") == position,
            gradient[(*at[:axis], *at[axis + 1 :])],
            tirx.const(0, gradient.dtype),
        )

    return te.compute(shape, element, name="take_gradient")
