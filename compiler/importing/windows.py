"""Conversions of the operators with a sliding window: convolutions, pooling, padding.

TVM's importer writes automatic padding as a hidden ``call_tir``, rounds some of it the wrong way,
and forgets attributes of ``ConvTranspose``. Here every padding follows from the output's shape,
which ONNX's shape inference gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from tvm.relax import op

from .call import Call, Converter, const

_PAD_MODES: Final = {
    "constant": "constant",
    "edge": "replicate",
    "reflect": "reflect",
    "wrap": "circular",
}
_CONV: Final = {3: op.nn.conv1d, 4: op.nn.conv2d, 5: op.nn.conv3d}
_CONV_TRANSPOSE: Final = {
    3: op.nn.conv1d_transpose,
    4: op.nn.conv2d_transpose,
    5: op.nn.conv3d_transpose,
}
_MAX_POOL: Final = {3: op.nn.max_pool1d, 4: op.nn.max_pool2d, 5: op.nn.max_pool3d}
_AVG_POOL: Final = {3: op.nn.avg_pool1d, 4: op.nn.avg_pool2d, 5: op.nn.avg_pool3d}


def _split(totals: Sequence[int], mode: str) -> list[int]:
    """Split padding totals into all begins, then all ends; an odd one goes where `mode` says."""
    small = [t // 2 for t in totals]
    large = [t - s for t, s in zip(totals, small, strict=True)]
    return [*large, *small] if mode == "SAME_LOWER" else [*small, *large]


def window_pads(
    attributes: Mapping[str, Any],
    given: Sequence[int],
    result: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[int]:
    """Return begins, then ends, of the padding before a sliding window.

    Parameters
    ----------
    attributes : mapping
        Of the node: ``auto_pad`` and ``pads``.
    given, result : sequence of int
        Spatial sizes of the input and the output.
    kernel, strides, dilations : sequence of int
        One for each spatial axis.
    """
    rank = len(given)
    mode = attributes.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return [0] * (2 * rank)
    if mode == "NOTSET":
        return [int(p) for p in attributes.get("pads", [0] * (2 * rank))]
    totals = [
        max((o - 1) * s + (k - 1) * d + 1 - i, 0)
        for i, o, k, s, d in zip(given, result, kernel, strides, dilations, strict=True)
    ]
    return _split(totals, mode)


def _bias(call: Call, result: Any) -> Any:
    bias = call.input(2)
    if bias is None:
        return result
    shape = [1, -1] + [1] * (len(call.shape()) - 2)
    value = call.value(2)
    if value is not None:
        return op.add(result, const(value.reshape(shape), str(bias.ty.dtype)))
    return op.add(result, op.reshape(bias, [1, call.shape(2)[0], *shape[2:]]))


def _layouts(rank: int) -> tuple[str, str]:
    spatial = {3: "W", 4: "HW", 5: "DHW"}[rank]
    return "NC" + spatial, spatial


def _conv(call: Call) -> Any:
    rank = len(call.shape())
    if rank not in _CONV:
        return None
    spatial = rank - 2
    strides = call.attributes.get("strides", [1] * spatial)
    dilations = call.attributes.get("dilations", [1] * spatial)
    data, axes = _layouts(rank)
    pads = window_pads(
        call.attributes,
        call.shape()[2:],
        call.outputs[0].shape[2:],
        call.shape(1)[2:],
        strides,
        dilations,
    )
    result = _CONV[rank](
        call.inputs[0],
        call.inputs[1],
        strides=strides,
        padding=pads,
        dilation=dilations,
        groups=call.attributes.get("group", 1),
        data_layout=data,
        kernel_layout="OI" + axes,
    )
    return _bias(call, call.bb.normalize(result))


def _conv_transpose(call: Call) -> Any:
    """Pad by ``s (i - 1) + output_padding + d (k - 1) + 1 - o``, from the output's size ``o``."""
    rank = len(call.shape())
    if rank not in _CONV_TRANSPOSE:
        return None
    spatial = rank - 2
    strides = call.attributes.get("strides", [1] * spatial)
    dilations = call.attributes.get("dilations", [1] * spatial)
    extra = list(call.attributes.get("output_padding", [0] * spatial))
    mode = call.attributes.get("auto_pad", "NOTSET")
    if mode == "NOTSET" and "output_shape" not in call.attributes:
        pads = [int(p) for p in call.attributes.get("pads", [0] * (2 * spatial))]
    else:
        totals = [
            s * (i - 1) + e + d * (k - 1) + 1 - o
            for i, o, k, s, d, e in zip(
                call.shape()[2:],
                call.outputs[0].shape[2:],
                call.shape(1)[2:],
                strides,
                dilations,
                extra,
                strict=True,
            )
        ]
        # A window that is too small for the output is widened at its end.
        extra = [e + max(-t, 0) for e, t in zip(extra, totals, strict=True)]
        lower = "SAME_LOWER" if mode != "SAME_UPPER" else mode
        pads = _split([max(t, 0) for t in totals], lower)
    if any(e >= s for e, s in zip(extra, strides, strict=True)):
        return None
    data, axes = _layouts(rank)
    result = _CONV_TRANSPOSE[rank](
        call.inputs[0],
        call.inputs[1],
        strides=strides,
        padding=pads,
        output_padding=extra,
        dilation=dilations,
        groups=call.attributes.get("group", 1),
        data_layout=data,
        kernel_layout="IO" + axes,
    )
    return _bias(call, call.bb.normalize(result))


def _pool(call: Call, *, average: bool) -> Any:
    rank = len(call.shape())
    if rank not in _MAX_POOL:
        return None
    given, result = call.shape()[2:], call.outputs[0].shape[2:]
    kernel = call.attributes["kernel_shape"]
    strides = call.attributes.get("strides", [1] * len(kernel))
    dilations = call.attributes.get("dilations", [1] * len(kernel))
    pads = window_pads(call.attributes, given, result, kernel, strides, dilations)
    begins, ends = pads[: len(kernel)], pads[len(kernel) :]
    # ceil_mode: what the last window reads beyond the padding belongs to no element.
    reach = [
        (o - 1) * s + (k - 1) * d + 1 - i - b
        for o, s, k, d, i, b in zip(result, strides, kernel, dilations, given, begins, strict=True)
    ]
    data = call.inputs[0]
    counted = average and bool(call.attributes.get("count_include_pad", 0)) and any(pads)
    if counted and any(r > e for r, e in zip(reach, ends, strict=True)):
        widths = [0] * 4 + [w for pair in zip(begins, ends, strict=True) for w in pair]
        data = call.bb.normalize(op.nn.pad(data, widths))
        reach = [max(r - e, 0) for r, e in zip(reach, ends, strict=True)]
        begins, ends, counted = [0] * len(kernel), [0] * len(kernel), False
    else:
        ends = [max(r, e) for r, e in zip(reach, ends, strict=True)]
        reach = ends
    pool = _AVG_POOL if average else _MAX_POOL
    return pool[rank](
        data,
        kernel,
        strides=strides,
        padding=[*begins, *reach],
        dilation=dilations,
        count_include_pad=counted,
        layout=_layouts(rank)[0],
    )


def _max_pool(call: Call) -> Any:
    return _pool(call, average=False)


def _average_pool(call: Call) -> Any:
    return _pool(call, average=True)


def _global(reduce: Any) -> Converter:
    def convert(call: Call) -> Any:
        return reduce(call.inputs[0], axis=list(range(2, len(call.shape()))), keepdims=True)

    return convert


def _pad(call: Call) -> Any:
    rank = len(call.shape())
    pads = call.ints(1, "pads")
    mode = call.attributes.get("mode", "constant")
    if pads is None or mode not in _PAD_MODES or call.dtype() == "bool":
        return None
    axes = call.ints(3, "axes") or list(range(rank))
    widths = np.zeros((rank, 2), np.int64)
    for axis, begin, end in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        widths[axis] = begin, end
    data = call.inputs[0]
    if (widths < 0).any():  # a negative padding cuts
        shape = call.shape()
        begins = [max(-int(w), 0) for w in widths[:, 0]]
        stops = [n - max(-int(w), 0) for n, w in zip(shape, widths[:, 1], strict=True)]
        data = call.bb.normalize(op.strided_slice(data, list(range(rank)), begins, stops))
        widths = np.maximum(widths, 0)
    if not widths.any():
        return data
    fill = 0.0
    if call.input(2) is not None:
        value = call.value(2)
        if value is None:
            return None
        fill = float(value.reshape(-1)[0])
    elif call.opset < 11:
        fill = float(call.attributes.get("value", 0.0))
    return op.nn.pad(data, [int(w) for w in widths.reshape(-1)], _PAD_MODES[mode], fill)


WINDOWS: Final[Mapping[str, Converter]] = {
    "AveragePool": _average_pool,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "GlobalAveragePool": _global(op.mean),
    "GlobalMaxPool": _global(op.max),
    "MaxPool": _max_pool,
    "Pad": _pad,
}
"""By operator of the default domain."""
