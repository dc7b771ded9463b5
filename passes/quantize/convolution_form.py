"""How every kind of convolution is written with the two that have integer kernels.

Those are convolutions of one group, and of one filter for each channel. Other groups are cut into
convolutions of some channels; a transposed convolution is one that computes all of its phases as
channels, which are interleaved afterwards (see `hone.passes.lower.unify_convolutions`). All of it
over NHWC and on integers. Numerics: exact, bytes are moved and zeros added to weights only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm.ir import Op

from hone.passes.graph.dataflow import PART, shape_of
from hone.passes.lower.unify_convolutions import Phases, interleave, phase_weight

from .weight_offsets import Emit

LEAST_FILTERS = 16
"""Of one convolution of several groups: neighbours are computed together up to so many, with zeros
between them, because a kernel computes vectors of filters whether they are there or not."""


@dataclass(frozen=True, kw_only=True)
class Interleaving:
    """How the phases of a transposed convolution become its result.

    Parameters
    ----------
    rows, columns : Phases
        Of each axis.
    height, width : int
        Of the result.
    """

    rows: Phases
    columns: Phases
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """One convolution that has a kernel.

    Parameters
    ----------
    inputs : tuple of int
        First input channel, and the one after the last.
    outputs : tuple of int
        For each of its filters, the output channel of the whole that it computes.
    """

    inputs: tuple[int, int]
    outputs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Form:
    """How one convolution is computed.

    Parameters
    ----------
    strides, padding, dilation : tuple of int
        Of every part.
    groups : int
        Of every part: 1, or one for each channel.
    parts : tuple of Part
        In the order of their output channels.
    interleaving : Interleaving or None
        Of a transposed convolution, which has one part.
    """

    strides: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    parts: tuple[Part, ...]
    interleaving: Interleaving | None = None

    def weights(self, weight: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the weights ``[k, R, S, c]`` of each part.

        Parameters
        ----------
        weight : numpy.ndarray
            ``[K, R, S, C // groups]`` of the whole, of any type; 0 means no weight.
        """
        if self.interleaving is not None:
            transposed = weight.transpose(3, 0, 1, 2)
            phases = phase_weight(transposed, self.interleaving.rows, self.interleaving.columns)
            return (np.ascontiguousarray(phases.transpose(0, 2, 3, 1)),)
        if len(self.parts) == 1 and len(self.parts[0].outputs) == len(weight):
            part = self.parts[0]
            if self.groups > 1 or part.inputs[1] - part.inputs[0] == weight.shape[3]:
                return (weight,)
        return tuple(self._diagonal(weight, part) for part in self.parts)

    def _diagonal(self, weight: np.ndarray, part: Part) -> np.ndarray:
        """Return the weights of neighbouring groups, with zeros for the others' channels."""
        depth = weight.shape[3]
        groups = (part.inputs[1] - part.inputs[0]) // depth
        each = len(part.outputs) // groups
        block = np.zeros((len(part.outputs), *weight.shape[1:3], groups * depth), weight.dtype)
        for index in range(groups):
            filters = slice(index * each, (index + 1) * each)
            channels = slice(index * depth, (index + 1) * depth)
            block[filters, ..., channels] = weight[list(part.outputs[filters])]
        return block

    def read(self, data: relax.Var, part: Part, layer: str, emit: Emit) -> relax.Var:
        """Return what a part reads of ``[N, H, W, C]``."""
        return _channels(data, part.inputs, f"{layer}{PART}group", emit)

    def read_result(self, tensor: relax.Var, part: Part, layer: str, emit: Emit) -> relax.Var:
        """Return what a part reads of a tensor of the result's shape."""
        first, last = part.outputs[0], part.outputs[-1]
        return _channels(tensor, (first, last + 1), f"{layer}{PART}group", emit)

    def joined(self, results: list[relax.Call], layer: str, emit: Emit) -> relax.Expr:
        """Return the result of the whole from those of the parts."""
        if self.interleaving is not None:
            found = self.interleaving
            phases = emit(results[0], f"{layer}{PART}phases")

            def named(value: relax.Expr) -> relax.Var:
                return emit(value, f"{layer}{PART}interleave")

            return interleave(
                phases,
                found.rows,
                found.columns,
                size=(found.height, found.width),
                emit=named,
            )
        if len(results) == 1:
            return results[0]
        tensors = [emit(result, f"{layer}{PART}group") for result in results]
        return relax.op.concat(tensors, 3)


def form_of(call: relax.Call) -> Form | str:
    """Return how a convolution is computed, or why it is not.

    Parameters
    ----------
    call : relax.Call
        ``nn.conv2d`` in NCHW and OIHW or NHWC and OHWI, or ``nn.conv2d_transpose`` in NCHW and
        IOHW or NHWC and IOHW, of static shapes.
    """
    attrs = call.attrs
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout))
    transposed = call.op == _TRANSPOSED
    known = _TRANSPOSED_LAYOUTS if transposed else _LAYOUTS
    if layouts not in known or str(attrs.out_layout or layouts[0]) != layouts[0]:
        wanted = " or ".join(" ".join(pair) for pair in known)
        return f"the layout is {' '.join(layouts)}, not {wanted}"
    return _transposed_form(call) if transposed else _form(call)


def _form(call: relax.Call) -> Form:
    attrs = call.attrs
    weight = shape_of(call.args[1])
    depth = weight[1] if str(attrs.kernel_layout) == "OIHW" else weight[3]
    groups, filters = int(attrs.groups), weight[0]
    depthwise = groups > 1 and groups == filters and depth == 1
    together = groups
    if groups > 1 and not depthwise:
        together = next(
            n for n in range(1, groups + 1)
            if groups % n == 0 and (n * filters >= LEAST_FILTERS * groups or n == groups)
        )  # fmt: skip
    each = filters // groups * together
    return Form(
        strides=_pair(attrs.strides),
        padding=_four(attrs.padding),
        dilation=_pair(attrs.dilation),
        groups=groups if depthwise else 1,
        parts=tuple(
            Part(
                inputs=(index * depth * together, (index + 1) * depth * together),
                outputs=tuple(range(index * each, (index + 1) * each)),
            )
            for index in range(groups // together)
        ),
    )


def _transposed_form(call: relax.Call) -> Form | str:
    attrs = call.attrs
    if int(attrs.groups) != 1 or _pair(attrs.dilation) != (1, 1):
        return (
            f"a transposed convolution of {int(attrs.groups)} groups and dilation "
            f"{list(_pair(attrs.dilation))} has no kernel: both must be 1"
        )
    at = (2, 3) if str(attrs.data_layout) == "NCHW" else (1, 2)
    channels, filters, *taps = shape_of(call.args[1])
    sizes, results = ([shape_of(x)[axis] for axis in at] for x in (call.args[0], call))
    strides, before = _pair(attrs.strides), _four(attrs.padding)[:2]
    rows, columns = (
        Phases.of(
            size=sizes[i], taps=taps[i], stride=strides[i], before=before[i], result=results[i]
        )
        for i in range(2)
    )
    padding = (rows.padding[0], columns.padding[0], rows.padding[1], columns.padding[1])
    if min(padding) < 0:
        return "what it leaves out of its result is larger than its kernel"
    return Form(
        strides=(1, 1),
        padding=padding,
        dilation=(1, 1),
        groups=1,
        parts=(
            Part(
                inputs=(0, channels),
                outputs=tuple(range(filters)) * (strides[0] * strides[1]),
            ),
        ),
        interleaving=Interleaving(rows=rows, columns=columns, height=results[0], width=results[1]),
    )


def _channels(tensor: relax.Var, span: tuple[int, int], name: str, emit: Emit) -> relax.Var:
    if span == (0, shape_of(tensor)[3]):
        return tensor
    return emit(relax.op.strided_slice(tensor, axes=[3], begin=[span[0]], end=[span[1]]), name)


def _pair(values: object) -> tuple[int, int]:
    first, second = (int(x) for x in values)  # type: ignore[attr-defined]
    return first, second


def _four(values: object) -> tuple[int, int, int, int]:
    top, left, bottom, right = (int(x) for x in values)  # type: ignore[attr-defined]
    return top, left, bottom, right


_TRANSPOSED = Op.get("relax.nn.conv2d_transpose")
_LAYOUTS = (("NCHW", "OIHW"), ("NHWC", "OHWI"))
_TRANSPOSED_LAYOUTS = (("NCHW", "IOHW"), ("NHWC", "IOHW"))
