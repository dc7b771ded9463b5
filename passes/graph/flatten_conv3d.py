"""Writes 3-D convolutions as 2-D ones, whose input channels are those of all taps of a depth.

Rewrites ``relax.nn.conv3d`` in NCDHW with constant weights: the slices of the input that the taps
along the depth read are joined as channels, and every depth of the result is an image of its own.
The weights ``[K, C, T, R, S]`` become ``[K, T C, R, S]``, group by group. Runs on NCDHW modules
before the layout changes; running it twice is the same as once. Numerics: sums may be taken in
another order.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Op

from .dataflow import PART, Dataflow, Rebuilder, is_dataflow, shape_of

_CONV3D = Op.get("relax.nn.conv3d")


@relax.transform.function_pass(opt_level=0)
class FlattenConv3d:
    """Write every 3-D convolution with constant weights as a 2-D one."""

    def transform_function(
        self, function: relax.Function, _module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> relax.Function:
        """Return the function without 3-D convolutions, or the very same function."""
        if not is_dataflow(function):
            return function
        graph = Dataflow(function)
        chosen = {
            binding.var: weight
            for binding in graph.bindings
            if (weight := _weight(graph, binding.value)) is not None
        }
        if not chosen:
            return function
        builder = Rebuilder(function)
        for binding in graph.bindings:
            if binding.var in chosen:
                _flatten(builder, binding, chosen[binding.var])
            else:
                builder.copy(binding)
        return builder.finish()


def _weight(graph: Dataflow, value: relax.Expr) -> np.ndarray | None:
    """Return the constant weights of a 3-D convolution; None for everything else."""
    call = graph.call(value, _CONV3D) if isinstance(value, relax.Call) else None
    if call is None:
        return None
    attrs = call.attrs
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout))
    if layouts not in (("NCDHW", "OIDHW", ""), ("NCDHW", "OIDHW", "NCDHW")):
        return None
    return graph.constant(call.args[1])


def _flatten(builder: Rebuilder, binding: relax.VarBinding, weight: np.ndarray) -> None:
    """Write one 3-D convolution as slices, their join, a 2-D convolution and transpositions."""
    call, name = binding.value, str(binding.var.name)
    attrs = call.attrs
    stride, *strides = (int(x) for x in attrs.strides)
    step, *dilation = (int(x) for x in attrs.dilation)
    front, top, left, back, bottom, right = (int(x) for x in attrs.padding)
    groups = int(attrs.groups)
    data = builder.use(call.args[0])
    batch, channels, depth, height, width = shape_of(data)
    filters, each, taps = weight.shape[:3]
    _, _, images, *size = shape_of(call)

    def emit(value: relax.Expr, part: str) -> relax.Var:
        return builder.emit(value, f"{name}{PART}{part}")

    if front or back:
        widths = [0, 0, 0, 0, front, back, 0, 0, 0, 0]
        data = emit(relax.op.nn.pad(data, widths), "pad")
    slices = []
    for tap in range(taps):
        end = tap * step + (images - 1) * stride + 1
        cut = relax.op.strided_slice(
            data, axes=[2], begin=[tap * step], end=[end], strides=[stride]
        )
        whole = (tap * step, end, stride) == (0, depth + front + back, 1)
        part = data if whole else emit(cut, "slice")
        shape = (batch, groups, each, images, height, width)
        slices.append(emit(relax.op.reshape(part, shape), "groups"))
    joined = slices[0] if taps == 1 else emit(relax.op.concat(slices, axis=2), "concat")
    # [N, G, T C / G, D, H, W] → [N, D, G, T C / G, H, W]: the channels of each image together.
    moved = emit(relax.op.permute_dims(joined, [0, 3, 1, 2, 4, 5]), "images")
    flat = emit(relax.op.reshape(moved, (batch * images, channels * taps, height, width)), "flat")
    kernel = weight.transpose(0, 2, 1, 3, 4).reshape(filters, taps * each, *weight.shape[3:])
    result = emit(
        relax.op.nn.conv2d(
            flat,
            relax.const(np.ascontiguousarray(kernel)),
            strides=strides,
            padding=(top, left, bottom, right),
            dilation=dilation,
            groups=groups,
        ),
        "conv2d",
    )
    apart = emit(relax.op.reshape(result, (batch, images, filters, *size)), "apart")
    builder.bind(binding.var, relax.op.permute_dims(apart, [0, 2, 1, 3, 4]))
