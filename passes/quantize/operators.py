"""hone's integer operators in Relax: constructors, type inference and registration.

Every operator takes and gives *levels*: uint8 or int8 tensors whose real values are
``scale × (level - zero_point)``. What differs from layer to layer is a tensor argument (multiplier,
zero points, bounds), never an attribute, so that two layers of one shape lower to one kernel.

Importing this module registers the operators; `hone.passes.quantize.legalize` lowers them.
The arithmetic, the same for every operator and exact to the bit, is in
`hone.passes.quantize.arithmetic`.

The int32 tensor ``levels`` of an operator holds, in this order: the zero point of each quantized
input, then for a quantized output its zero point, its lowest and its highest level (a ReLU or
ReLU6 is nothing but tighter bounds), then for a residual input its zero point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax
from tvm.ir import Op

from hone.errors import ModelError

from .type_inference import INFERENCE

NAMES = tuple(INFERENCE)
"""The registered operators."""


def conv2d_int8(
    data: relax.Expr,
    weight: relax.Expr,
    bias: relax.Expr,
    multiplier: relax.Expr,
    levels: relax.Expr,
    residual: relax.Expr | None = None,
    residual_multiplier: relax.Expr | None = None,
    *,
    weight_offsets: relax.Expr | None = None,
    window_sums: relax.Expr | None = None,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    out_dtype: str = "uint8",
) -> relax.Call:
    """Convolution of levels, requantized: the whole layer in one operator.

    Padding is the data's zero point, which means 0.0, so the correction for the data's zero point
    is one number per output channel, already inside ``bias``.

    Parameters
    ----------
    data : relax.Expr
        Levels ``[N, H, W, C]``.
    weight : relax.Expr
        int8 ``[K, R, S, C // groups]``; of one filter for each channel also int16.
    bias : relax.Expr
        int32 ``[K]``, in steps of ``scale_data × scale_weight[k]``, less
        ``zero_point_data × sum(weight[k])``, with the offsets in the weights.
    multiplier : relax.Expr
        float32 ``[K]``: ``scale_data × scale_weight[k] / scale_output``; with a residual that
        times ``2**GUARD_BITS``; for a float32 output ``scale_data × scale_weight[k]``.
    levels : relax.Expr
        int32 ``[4]``; ``[1]`` for a float32 output; ``[5]`` with a residual. See the module.
    residual : relax.Expr, optional
        Levels of the output's shape, added before the output is rounded.
    residual_multiplier : relax.Expr, optional
        float32 ``[1]``: ``scale_residual / scale_output × 2**GUARD_BITS``.
    weight_offsets : relax.Expr, optional
        int32 ``[K]``, added to every weight of an output channel: weights of 9 bits, which are what
        8-bit levels less a zero point of their own take. Worth ``offset[k]`` times the sum of the
        levels under the window, the same for all channels.
    window_sums : relax.Expr, optional
        int32 ``[N, OH, OW, 1]``, those sums, zero points in the padding included: of `row_sums`
        and, where the window is more than one pixel, `window_sums`.
    strides, dilation : sequence of int
        ``(height, width)``.
    padding : sequence of int
        ``(top, left, bottom, right)``.
    groups : int
        1, or C with K = C (depthwise).
    out_dtype : str
        ``uint8`` or ``int8``; or ``float32``, the accumulator's real value, unrounded.

    Returns
    -------
    relax.Call
        ``[N, OH, OW, K]`` of ``out_dtype``.

    Raises
    ------
    ModelError
        A shape, a dtype or an attribute does not fit.
    """
    return _call(
        "hone.conv2d_int8",
        _with_optional(
            [data, weight, bias, multiplier, levels],
            residual=(residual, residual_multiplier),
            offsets=(weight_offsets, window_sums),
        ),
        offsets=weight_offsets is not None,
        strides=[int(x) for x in strides],
        padding=[int(x) for x in padding],
        dilation=[int(x) for x in dilation],
        groups=int(groups),
        out_dtype=out_dtype,
    )


def dense_int8(
    data: relax.Expr,
    weight: relax.Expr,
    bias: relax.Expr,
    multiplier: relax.Expr,
    levels: relax.Expr,
    residual: relax.Expr | None = None,
    residual_multiplier: relax.Expr | None = None,
    *,
    weight_offsets: relax.Expr | None = None,
    window_sums: relax.Expr | None = None,
    out_dtype: str = "uint8",
) -> relax.Call:
    """Matrix product of levels with constant weights, requantized.

    Parameters
    ----------
    data : relax.Expr
        Levels ``[..., C]``.
    weight : relax.Expr
        int8 ``[K, C]``: output channels first, as in `conv2d_int8`.
    bias, multiplier, levels, residual, residual_multiplier, weight_offsets, out_dtype
        As for `conv2d_int8`.
    window_sums : relax.Expr, optional
        int32 ``[..., 1]`` of `row_sums`.

    Returns
    -------
    relax.Call
        ``[..., K]`` of ``out_dtype``.

    Raises
    ------
    ModelError
        A shape or a dtype does not fit.
    """
    return _call(
        "hone.dense_int8",
        _with_optional(
            [data, weight, bias, multiplier, levels],
            residual=(residual, residual_multiplier),
            offsets=(weight_offsets, window_sums),
        ),
        offsets=weight_offsets is not None,
        out_dtype=out_dtype,
    )


def row_sums(data: relax.Expr) -> relax.Call:
    """Sum of the levels of each row or pixel, int32: ``[..., C] → [..., 1]``.

    Parameters
    ----------
    data : relax.Expr
        Levels.
    """
    return _call("hone.row_sums", [data])


def window_sums(
    data: relax.Expr,
    border: relax.Expr,
    *,
    taps: Sequence[int],
    strides: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
) -> relax.Call:
    """Sum of `row_sums` under each position of a window, int32 ``[N, OH, OW, 1]``.

    Parameters
    ----------
    data : relax.Expr
        int32 ``[N, H, W, 1]``.
    border : relax.Expr
        int32 ``[1]``, what stands in the padding: the data's zero point times its channels.
    taps, strides, padding, dilation : sequence of int
        ``(height, width)``, padding as in `conv2d_int8`.
    """
    return _call(
        "hone.window_sums",
        [data, border],
        taps=[int(x) for x in taps],
        strides=[int(x) for x in strides],
        padding=[int(x) for x in padding],
        dilation=[int(x) for x in dilation],
    )


def add_int8(
    left: relax.Expr,
    right: relax.Expr,
    multipliers: relax.Expr,
    levels: relax.Expr,
    *,
    out_dtype: str = "uint8",
) -> relax.Call:
    """Sum of two tensors of levels of one shape, requantized.

    Parameters
    ----------
    left, right : relax.Expr
        Levels of one shape.
    multipliers : relax.Expr
        float32 ``[2]``: ``scale_left / scale_output × 2**GUARD_BITS`` and the right one's.
    levels : relax.Expr
        int32 ``[5]``: left and right zero point, output zero point, lowest, highest level.
    out_dtype : str
        ``uint8`` or ``int8``.
    """
    return _call("hone.add_int8", [left, right, multipliers, levels], out_dtype=out_dtype)


def multiply_int8(
    left: relax.Expr,
    right: relax.Expr,
    multiplier: relax.Expr,
    levels: relax.Expr,
    *,
    out_dtype: str = "uint8",
) -> relax.Call:
    """Product of two tensors of levels, element by element, requantized.

    Parameters
    ----------
    left, right : relax.Expr
        Levels of one rank; axes of extent 1 are repeated.
    multiplier : relax.Expr
        float32 ``[1]``: ``scale_left × scale_right / scale_output``.
    levels, out_dtype
        As for `add_int8`.
    """
    return _call("hone.multiply_int8", [left, right, multiplier, levels], out_dtype=out_dtype)


def table_int8(data: relax.Expr, table: relax.Expr) -> relax.Call:
    """Look up each level; any function of one tensor is such a table, see `level_tables`.

    Parameters
    ----------
    data, table : relax.Expr
        uint8: any shape, and ``[256]``.
    """
    return _call("hone.table_int8", [data, table])


def avg_pool2d_int8(
    data: relax.Expr,
    multiplier: relax.Expr,
    levels: relax.Expr,
    *,
    pool_size: Sequence[int],
    strides: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    out_dtype: str = "uint8",
) -> relax.Call:
    """Window average of levels ``[N, H, W, C]``; padding counts, as the zero point.

    Parameters
    ----------
    data : relax.Expr
        Levels ``[N, H, W, C]``.
    multiplier : relax.Expr
        float32 ``[1]``: ``scale_data / (scale_output × pool height × pool width)``.
    levels : relax.Expr
        int32 ``[4]``: data zero point, output zero point, lowest, highest level.
    pool_size, strides, padding, dilation : sequence of int
        ``(height, width)``, padding as in `conv2d_int8`.
    out_dtype : str
        ``uint8`` or ``int8``.
    """
    return _call(
        "hone.avg_pool2d_int8",
        [data, multiplier, levels],
        pool_size=[int(x) for x in pool_size],
        strides=[int(x) for x in strides],
        padding=[int(x) for x in padding],
        dilation=[int(x) for x in dilation],
        out_dtype=out_dtype,
    )


def mean_int8(
    data: relax.Expr,
    multiplier: relax.Expr,
    levels: relax.Expr,
    *,
    axis: Sequence[int],
    keepdims: bool = False,
    out_dtype: str = "uint8",
) -> relax.Call:
    """Mean of levels over axes.

    Parameters
    ----------
    data : relax.Expr
        Levels, any shape.
    multiplier : relax.Expr
        float32 ``[1]``: ``scale_data / (scale_output × number of averaged elements)``.
    levels : relax.Expr
        int32 ``[4]``: data zero point, output zero point, lowest, highest level.
    axis : sequence of int
        Axes to average over, each in ``[-rank, rank)``.
    keepdims : bool
        Keep the averaged axes with extent 1.
    out_dtype : str
        ``uint8`` or ``int8``.
    """
    return _call(
        "hone.mean_int8",
        [data, multiplier, levels],
        axis=[int(x) for x in axis],
        keepdims=bool(keepdims),
        out_dtype=out_dtype,
    )


def quantize(
    data: relax.Expr, scale: relax.Expr, zero_point: relax.Expr, *, out_dtype: str = "uint8"
) -> relax.Call:
    """Levels of a real tensor, per tensor; `hone.passes.quantize.qparams.quantize`, bit for bit.

    NaN becomes the lowest level.

    Parameters
    ----------
    data : relax.Expr
        float32, any shape.
    scale : relax.Expr
        float32 ``[]``.
    zero_point : relax.Expr
        int32 ``[]``.
    out_dtype : str
        ``uint8`` or ``int8``.
    """
    return _call("hone.quantize", [data, scale, zero_point], out_dtype=out_dtype)


def dequantize(data: relax.Expr, scale: relax.Expr, zero_point: relax.Expr) -> relax.Call:
    """Real values of levels, float32: ``(level - zero_point) × scale``.

    Parameters
    ----------
    data : relax.Expr
        Levels, or int32; any shape.
    scale : relax.Expr
        float32 ``[]``.
    zero_point : relax.Expr
        int32 ``[]``.
    """
    return _call("hone.dequantize", [data, scale, zero_point])


def _with_optional(
    arguments: list[relax.Expr],
    *,
    residual: Sequence[relax.Expr | None],
    offsets: Sequence[relax.Expr | None],
) -> list[relax.Expr]:
    for what, pair in (
        ("a residual and its multiplier", residual),
        ("offsets of the weights and the sums that they multiply", offsets),
    ):
        given = [each for each in pair if each is not None]
        if len(given) == 1:
            raise ModelError(f"{what} come together or not at all")
        arguments = [*arguments, *given]
    return arguments


def _call(name: str, arguments: list[relax.Expr], **attributes: Any) -> relax.Call:
    attrs = tvm.ir.make_node("ir.DictAttrs", **attributes) if attributes else None
    call = relax.Call(Op.get(name), arguments, attrs)
    INFERENCE[name](call)
    return call


def _register() -> None:
    for name, infer in INFERENCE.items():
        tvm.ir._ffi_api.RegisterOp(name, f"See hone.passes.quantize.operators, {name}.")
        tvm.ir.register_op_attr(name, "FInferType", lambda call, _context, infer=infer: infer(call))
        tvm.ir.register_op_attr(name, "FPurity", True)


_register()
