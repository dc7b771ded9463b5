"""What integer layers return, written again in numpy from the text of their specification.

For every test of a lowering: `conv_sums` and `requantized` together are ``hone.conv2d_int8``.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from hone.passes.quantize.arithmetic import GUARD_BITS


class Geometry(Protocol):
    """What a case says of its windows; ``filters`` is ``(K, R, S)``."""

    filters: tuple[int, int, int]
    strides: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]


def conv_sums(
    case: Geometry,
    data: np.ndarray,
    weight: np.ndarray,
    zero_point: int,
    *,
    depthwise: bool = False,
) -> np.ndarray:
    """Return int64 sums ``[N, OH, OW, K]`` of ``[N, H, W, C]`` and ``[K, R, S, C]``."""
    top, left, bottom, right = case.padding
    padded = np.pad(
        data.astype(np.int64),
        ((0, 0), (top, bottom), (left, right), (0, 0)),
        constant_values=zero_point,
    )
    span = [d * (t - 1) + 1 for d, t in zip(case.dilation, case.filters[1:], strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(padded, span, axis=(1, 2))
    view = view[:, :: case.strides[0], :: case.strides[1]]
    view = view[..., :: case.dilation[0], :: case.dilation[1]]
    if depthwise:
        return np.einsum("nhwkrs,krs->nhwk", view, weight[..., 0].astype(np.int64))
    return np.einsum("nhwcrs,krsc->nhwk", view, weight.astype(np.int64))


def requantized(
    acc: np.ndarray,
    multiplier: np.ndarray,
    levels: np.ndarray,
    out: str,
    residual: np.ndarray | None = None,
    residual_multiplier: np.ndarray | None = None,
) -> np.ndarray:
    """Requantize sums by the specification's text (`hone.passes.quantize.arithmetic`)."""
    assert np.abs(acc).max() < 2**31
    scaled = acc.astype(np.int32).astype(np.float32) * multiplier
    if out == "float32":
        return scaled
    zero_point, low, high = (int(x) for x in levels[1:4])
    steps = np.rint(scaled)
    if residual is None:
        return np.clip(steps.astype(np.float64) + zero_point, low, high).astype(out)
    other = (residual.astype(np.int32) - levels[4]).astype(np.float32) * residual_multiplier
    total = steps.astype(np.int64) + np.rint(other).astype(np.int64)
    rounded = np.floor_divide(total + 2 ** (GUARD_BITS - 1), 2**GUARD_BITS)
    return np.clip(rounded + zero_point, low, high).astype(out)
