"""Writes 1-D and transposed convolutions as plain 2-D ones, which have templates.

Rewrites ``relax.nn.conv1d``, ``conv1d_transpose`` and ``conv2d_transpose`` with constant weights. A
transposed convolution of stride s is s x s convolutions of stride 1, one for each remainder of the
output position, whose results are interleaved. Runs on NCHW modules before the layout pass, and
takes transposed convolutions in NHWC from modules that had it already; running it twice is the same
as once. Numerics: sums may be taken in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Op


@dataclass(frozen=True, kw_only=True)
class Phases:
    """How one axis of a transposed convolution falls apart into plain ones.

    With ``o + p = s q + f``, output ``o`` takes the taps ``f + s t`` on inputs ``q - t``.

    Parameters
    ----------
    stride : int
        s, the number of phases.
    taps : int
        Of each phase, ``ceil(k / s)``.
    padding : tuple of int
        Before and after the input of the plain convolution.
    skip : int
        Interleaved results before the first output.
    """

    stride: int
    taps: int
    padding: tuple[int, int]
    skip: int

    @classmethod
    def of(cls, *, size: int, taps: int, stride: int, before: int, result: int) -> Phases:
        """Return the phases of an axis of ``size`` inputs and ``result`` outputs."""
        each = -(-taps // stride)
        first, last = before // stride, (before + result - 1) // stride
        left = each - 1 - first
        right = (last - first + 1) - size - left + each - 1
        return cls(
            stride=stride,
            taps=each,
            padding=(left, right),
            skip=before - first * stride,
        )


def phase_weight(weight: np.ndarray, rows: Phases, columns: Phases) -> np.ndarray:
    """Return the weights ``[I, O, R, S]`` of a transposed convolution as ``[s s O, I, T, T]``."""
    depth, channels, taps_h, taps_w = weight.shape
    padded = np.zeros(
        (depth, channels, rows.taps * rows.stride, columns.taps * columns.stride), weight.dtype
    )
    padded[:, :, :taps_h, :taps_w] = weight
    # Tap f + s t of phase f multiplies input q - t: flipped, it is a correlation.
    split = padded.reshape(depth, channels, rows.taps, rows.stride, columns.taps, columns.stride)[
        :, :, ::-1, :, ::-1
    ]
    phases = split.transpose(3, 5, 1, 0, 2, 4)
    return np.ascontiguousarray(phases.reshape(-1, depth, rows.taps, columns.taps))


def interleave(
    phases: relax.Var,
    rows: Phases,
    columns: Phases,
    *,
    size: tuple[int, int],
    emit: Callable[[relax.Expr], relax.Var],
) -> relax.Expr:
    """Return the result ``[N, H, W, O]`` of a transposed convolution from those of its phases.

    Parameters
    ----------
    phases : relax.Var
        ``[N, h, w, s s O]``, in the order of `phase_weight`.
    rows, columns : Phases
        Of each axis.
    size : tuple of int
        Height and width of the result.
    emit : callable
        Binds an expression to a variable.
    """
    batch, down, across, channels = _ints(phases.ty.shape)
    strides = (rows.stride, columns.stride)
    if strides == (1, 1):
        return phases
    kept = channels // (strides[0] * strides[1])
    apart = emit(relax.op.reshape(phases, (batch, down, across, *strides, kept)))
    ordered = emit(relax.op.permute_dims(apart, [0, 1, 3, 2, 4, 5]))
    shape = (batch, down * strides[0], across * strides[1], kept)
    whole = relax.op.reshape(ordered, shape)
    begin = [rows.skip, columns.skip]
    end = [rows.skip + size[0], columns.skip + size[1]]
    if (begin, end) == ([0, 0], [shape[1], shape[2]]):
        return whole
    return relax.op.strided_slice(emit(whole), axes=[1, 2], begin=begin, end=end)


def _ints(values: object) -> list[int]:
    return [int(value) for value in values]  # type: ignore[attr-defined]


@relax.expr_functor.mutator
class _Mutator(relax.PyExprMutator):  # type: ignore[misc]
    """Replaces the calls of a module's functions, and remembers whether there were any."""

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self.changed = False

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if not isinstance(call, relax.Call) or not isinstance(call.op, Op):
            return call
        rule = {
            "relax.nn.conv1d": self._conv1d,
            "relax.nn.conv1d_transpose": self._conv1d_transpose,
            "relax.nn.conv2d_transpose": self._conv2d_transpose,
        }.get(call.op.name)
        if rule is None or not isinstance(call.args[1], tvm.ir.GenericConst):
            return call
        result = rule(call)
        self.changed = self.changed or not result.same_as(call)
        return result

    def _emit(self, expression: relax.Expr) -> relax.Var:
        return self.builder_.emit(expression)

    def _conv1d(self, call: relax.Call) -> relax.Expr:
        attrs = call.attrs
        if attrs.data_layout != "NCW" or attrs.kernel_layout != "OIW":
            return call
        data, weight = call.args
        batch, channels, size = _ints(data.ty.shape)
        before, after = _ints(attrs.padding)
        image = self._emit(relax.op.reshape(data, (batch, channels, 1, size)))
        result = self._emit(
            relax.op.nn.conv2d(
                image,
                relax.const(weight.value.numpy()[:, :, None, :]),
                strides=(1, *_ints(attrs.strides)),
                padding=(0, before, 0, after),
                dilation=(1, *_ints(attrs.dilation)),
                groups=int(attrs.groups),
            )
        )
        return relax.op.reshape(result, _ints(call.ty.shape))

    def _conv1d_transpose(self, call: relax.Call) -> relax.Expr:
        attrs = call.attrs
        fits = attrs.data_layout == "NCW" and attrs.kernel_layout == "IOW"
        if not fits or int(attrs.groups) != 1 or _ints(attrs.dilation) != [1]:
            return call
        data, weight = call.args
        batch, channels, size = _ints(data.ty.shape)
        image = self._emit(relax.op.reshape(data, (batch, channels, 1, size)))
        _, kept, width = _ints(call.ty.shape)
        result = self._transposed(
            image,
            weight.value.numpy()[:, :, None, :],
            strides=(1, _ints(attrs.strides)[0]),
            before=(0, _ints(attrs.padding)[0]),
            result=(batch, kept, 1, width),
        )
        if result is None:
            return call
        return relax.op.reshape(self._emit(result), _ints(call.ty.shape))

    def _conv2d_transpose(self, call: relax.Call) -> relax.Expr:
        attrs = call.attrs
        if attrs.kernel_layout != "IOHW" or attrs.data_layout not in ("NCHW", "NHWC"):
            return call
        plain = int(attrs.groups) == 1 and _ints(attrs.dilation) == [1, 1]
        if attrs.data_layout == "NHWC":
            result = self._transposed_last(call) if plain else None
            return call if result is None else result
        if not plain:
            return call
        data, weight = call.args
        top, left = _ints(attrs.padding)[:2]
        batch, kept, height, width = _ints(call.ty.shape)
        stride_h, stride_w = _ints(attrs.strides)
        result = self._transposed(
            data,
            weight.value.numpy(),
            strides=(stride_h, stride_w),
            before=(top, left),
            result=(batch, kept, height, width),
        )
        return call if result is None else result

    def _transposed_last(self, call: relax.Call) -> relax.Expr | None:
        """Write a transposed convolution over NHWC, if its phases fit."""
        data, weight = call.args
        _, height, width, _ = _ints(call.ty.shape)
        _, in_height, in_width, _ = _ints(data.ty.shape)
        values = weight.value.numpy()
        strides, before = _ints(call.attrs.strides), _ints(call.attrs.padding)[:2]
        rows, columns = (
            Phases.of(size=size, taps=taps, stride=stride, before=first, result=result)
            for size, taps, stride, first, result in zip(
                (in_height, in_width),
                values.shape[2:],
                strides,
                before,
                (height, width),
                strict=True,
            )
        )
        if min(*rows.padding, *columns.padding) < 0:
            return None
        phases = self._emit(
            relax.op.nn.conv2d(
                data,
                relax.const(phase_weight(values, rows, columns).transpose(0, 2, 3, 1).copy()),
                padding=(rows.padding[0], columns.padding[0], rows.padding[1], columns.padding[1]),
                data_layout="NHWC",
                kernel_layout="OHWI",
            )
        )
        return interleave(phases, rows, columns, size=(height, width), emit=self._emit)

    def _transposed(
        self,
        data: relax.Expr,
        weight: np.ndarray,
        *,
        strides: tuple[int, int],
        before: tuple[int, int],
        result: tuple[int, int, int, int],
    ) -> relax.Expr | None:
        batch, channels, height, width = result
        _, _, in_height, in_width = _ints(data.ty.shape)
        rows = Phases.of(
            size=in_height,
            taps=weight.shape[2],
            stride=strides[0],
            before=before[0],
            result=height,
        )
        columns = Phases.of(
            size=in_width, taps=weight.shape[3], stride=strides[1], before=before[1], result=width
        )
        if min(*rows.padding, *columns.padding) < 0:
            return None
        phases = self._emit(
            relax.op.nn.conv2d(
                data,
                relax.const(phase_weight(weight, rows, columns)),
                padding=(rows.padding[0], columns.padding[0], rows.padding[1], columns.padding[1]),
            )
        )
        if strides == (1, 1):
            return phases
        _, _, down, across = _ints(phases.ty.shape)
        apart = self._emit(relax.op.reshape(phases, (batch, *strides, channels, down, across)))
        ordered = self._emit(relax.op.permute_dims(apart, [0, 3, 4, 1, 5, 2]))
        whole = self._emit(
            relax.op.reshape(ordered, (batch, channels, down * strides[0], across * strides[1]))
        )
        return relax.op.strided_slice(
            whole,
            axes=[2, 3],
            begin=[rows.skip, columns.skip],
            end=[rows.skip + height, columns.skip + width],
        )


@tvm.transform.module_pass(opt_level=0)
class UnifyConvolutions:
    """Write every convolution that has no template as one that has."""

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with 2-D convolutions only."""
        mutator = _Mutator(module)
        for variable, func in module.functions.items():
            if not isinstance(func, relax.Function):
                continue
            mutator.builder_.update_func(variable, mutator.visit_expr(func))
        return mutator.builder_.get() if mutator.changed else module
