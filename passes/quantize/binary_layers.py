"""Writes layers whose weights and activations are both signs, as XNOR-Net does.

The data keeps its mean magnitude beside its signs: with ``a[k] = mean|w[k]|`` and ``b`` the mean
magnitude of what one output reads, ::

    y[k] = a[k] × b × sum(sign(x) × sign(w[k]))

where ``b`` of a convolution is the mean over channels, averaged over the window. Padding is put
around the data first: zeros, whose sign is 1 and whose magnitude is 0.

Worked number: x = 0.5, -1.5 and w = 0.2, 0.4 give a = 0.3, b = 1 and 0.3 × 1 × (1 - 1) = 0, for
-0.5 in full. This is for networks that were trained so, with the signs taken before the ReLU: what
a ReLU leaves is never below 0, and tells a sign nothing.

Source: Rastegari et al., "XNOR-Net", ECCV 2016, equations 10 and 11.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

from .binarize import binarize

Emit = Callable[[relax.Expr, str], relax.Expr]


def binary_matmul(data: relax.Expr, weight: relax.Expr, emit: Emit) -> relax.Expr:
    """Return the product of the signs of ``[..., C]`` with ``[C, K]``, scaled by the data.

    Parameters
    ----------
    data : relax.Expr
        float32.
    weight : relax.Expr
        Decoded binary weights.
    emit : callable
        Binds an expression to a variable, by the name of the part.
    """
    magnitude = emit(relax.op.mean(emit(relax.op.abs(data), "abs"), axis=-1, keepdims=True), "mean")
    product = emit(relax.op.matmul(emit(binarize(data), "binarize"), weight), "product")
    return relax.op.multiply(product, magnitude)


def binary_conv2d(call: relax.Call, data: relax.Expr, weight: relax.Expr, emit: Emit) -> relax.Expr:
    """Return a convolution over NHWC with the signs of its data, scaled by the data.

    Parameters
    ----------
    call : relax.Call
        The convolution as it was: its geometry.
    data, weight, emit
        As for `binary_matmul`.
    """
    attrs = call.attrs
    top, left, bottom, right = (int(x) for x in attrs.padding)
    strides, dilation = ([int(x) for x in values] for values in (attrs.strides, attrs.dilation))
    if top or left or bottom or right:
        data = emit(relax.op.nn.pad(data, [0, 0, top, bottom, left, right, 0, 0]), "pad")
    magnitude = emit(relax.op.mean(emit(relax.op.abs(data), "abs"), axis=3, keepdims=True), "mean")
    taps = [int(extent) for extent in weight.ty.shape][1:3]
    window = relax.op.nn.avg_pool2d(
        magnitude, pool_size=taps, strides=strides, dilation=dilation, layout="NHWC"
    )
    product = relax.op.nn.conv2d(
        emit(binarize(data), "binarize"),
        weight,
        strides=strides,
        dilation=dilation,
        data_layout="NHWC",
        kernel_layout="OHWI",
    )
    return relax.op.multiply(emit(product, "product"), emit(window, "window"))
