"""The geometry of what slides over an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm import relax


@dataclass(frozen=True, kw_only=True)
class Window:
    """The geometry of a convolution or pooling window over NHWC.

    Parameters
    ----------
    shape : tuple of int
        Input ``(N, H, W, C)``.
    taps, strides, dilation : tuple of int
        ``(height, width)``.
    padding : tuple of int
        ``(top, left, bottom, right)``.
    """

    shape: tuple[int, int, int, int]
    taps: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]

    @classmethod
    def of(cls, data: relax.Expr, taps: Sequence[int], attrs: tvm.ir.Attrs) -> Window:
        """Return the window of a convolution or pooling call over NHWC ``data``."""
        return cls.of_shape([int(extent) for extent in data.ty.shape], taps, attrs)

    @classmethod
    def of_shape(cls, shape: Sequence[int], taps: Sequence[int], attrs: tvm.ir.Attrs) -> Window:
        """Return the window of a convolution or pooling call over ``(N, H, W, C)``."""
        batch, height, width, channels = shape
        taps_h, taps_w = (int(x) for x in taps)
        stride_h, stride_w = (int(x) for x in attrs.strides)
        dilation_h, dilation_w = (int(x) for x in attrs.dilation)
        top, left, bottom, right = (int(x) for x in attrs.padding)
        return cls(
            shape=(batch, height, width, channels),
            taps=(taps_h, taps_w),
            strides=(stride_h, stride_w),
            dilation=(dilation_h, dilation_w),
            padding=(top, left, bottom, right),
        )

    @property
    def output(self) -> tuple[int, int]:
        """Output ``(height, width)``: ``(H + pads - dilation (taps - 1) - 1) // stride + 1``."""
        _, height, width, _ = self.shape
        top, left, bottom, right = self.padding
        span_h = self.dilation[0] * (self.taps[0] - 1) + 1
        span_w = self.dilation[1] * (self.taps[1] - 1) + 1
        return (
            (height + top + bottom - span_h) // self.strides[0] + 1,
            (width + left + right - span_w) // self.strides[1] + 1,
        )

    @property
    def is_pointwise(self) -> bool:
        """Whether each output reads the one input at its place."""
        return self.taps == self.strides == (1, 1) and not any(self.padding)
