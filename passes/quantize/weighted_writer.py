"""Writes convolutions and matrix products in integers, whatever operators that takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm import relax

from hone.passes.graph.dataflow import PART

from . import operators
from .convolution_form import Form
from .integer_layer import IntegerLayer
from .weight_offsets import Emit, WindowSums


class WeightedWriter:
    """Writes the operators of layers with weights.

    Parameters
    ----------
    emit : callable
        Binds an expression to a variable of a name.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._sums = WindowSums(emit)

    def dense(
        self,
        constants: IntegerLayer,
        data: relax.Var,
        residual: relax.Var | None,
        *,
        layer: str,
        out_dtype: str,
        zero_point: relax.Var | None = None,
    ) -> relax.Call:
        """Return a matrix product.

        Parameters
        ----------
        constants : IntegerLayer
            Of the layer.
        data : relax.Var
            Levels ``[..., C]``.
        residual : relax.Var or None
            Levels that are added.
        layer : str
            Binding name.
        out_dtype : str
            Of the result.
        zero_point : relax.Var, optional
            int32 ``[]``, of the data, where only the run tells it; the constants are those of 0.
        """
        offsets = constants.weight_offsets
        return operators.dense_int8(
            data,
            *self._arguments(constants, residual, zero_point, layer),
            weight_offsets=None if offsets is None else relax.const(offsets),
            window_sums=None if offsets is None else self._sums.of_rows(data, layer),
            out_dtype=out_dtype,
        )

    def convolution(
        self,
        form: Form,
        constants: Sequence[IntegerLayer],
        data: relax.Var,
        residual: relax.Var | None,
        *,
        layer: str,
        out_dtype: str,
        zero_point: relax.Var | None = None,
    ) -> relax.Expr:
        """Return a convolution over ``[N, H, W, C]``.

        Parameters
        ----------
        form : Form
            Of the convolution.
        constants : sequence of IntegerLayer
            Of each of its parts.
        data, residual, layer, out_dtype, zero_point
            As for `dense`.
        """
        results = []
        for part, each in zip(form.parts, constants, strict=True):
            read = form.read(data, part, layer, self._emit)
            added = residual
            if residual is not None:
                added = form.read_result(residual, part, layer, self._emit)
            offsets, sums = each.weight_offsets, None
            if offsets is not None and each.weight is not None:
                sums = self._sums.of_windows(
                    read,
                    layer,
                    zero_point=int(each.levels[0]) if zero_point is None else zero_point,
                    taps=each.weight.shape[1:3],
                    strides=form.strides,
                    padding=form.padding,
                    dilation=form.dilation,
                )
            results.append(
                operators.conv2d_int8(
                    read,
                    *self._arguments(each, added, zero_point, layer),
                    weight_offsets=None if offsets is None else relax.const(offsets),
                    window_sums=sums,
                    strides=form.strides,
                    padding=form.padding,
                    dilation=form.dilation,
                    groups=form.groups,
                    out_dtype=out_dtype,
                )
            )
        return form.joined(results, layer, self._emit)

    def _arguments(
        self,
        constants: IntegerLayer,
        residual: relax.Var | None,
        zero_point: relax.Var | None,
        layer: str,
    ) -> list[relax.Expr]:
        """Return weight, bias, multiplier, levels and what belongs to a residual."""
        weight, stored = relax.const(constants.weight), constants.weight
        bias, levels = relax.const(constants.bias), relax.const(constants.levels)
        if zero_point is not None and stored is not None:
            sums = stored.reshape(len(stored), -1).sum(1, dtype=np.int32)
            if constants.weight_offsets is not None:
                sums = sums + constants.weight_offsets * (stored.size // len(stored))
            shift = self._emit(
                relax.op.multiply(zero_point, relax.const(sums.astype(np.int32))),
                f"{layer}{PART}zero_point",
            )
            bias = self._emit(relax.op.subtract(bias, shift), f"{layer}{PART}bias")
            levels = self._emit(relax.op.reshape(zero_point, (1,)), f"{layer}{PART}levels")
        found = [weight, bias, relax.const(constants.multiplier), levels]
        if residual is not None:
            found += [residual, relax.const(constants.residual_multiplier)]
        return found
