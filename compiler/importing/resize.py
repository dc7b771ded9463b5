"""Conversion of Resize and Upsample to one ``relax.image`` operator."""

from __future__ import annotations

from typing import Any

from tvm.relax import op

from .call import Call

_METHODS = {"nearest": "nearest_neighbor", "linear": "linear", "cubic": "cubic"}


def resize(call: Call) -> Any:
    """Convert Resize over the spatial axes of a tensor in NCW, NCHW or NCDHW.

    Scales are divided sizes here (`operators.refusal` sees to it), so that the output's shape,
    which ONNX's shape inference gave, says all.
    """
    rank = len(call.shape())
    mode = call.attributes.get("coordinate_transformation_mode", "half_pixel")
    if call.opset < 11:
        mode = "asymmetric"
    roi = None
    if mode == "tf_crop_and_resize":
        roi = _spatial_roi(call, rank)
    rounding = call.attributes.get("nearest_mode", "round_prefer_floor")
    options = {
        "method": _METHODS[call.attributes.get("mode", "nearest")],
        "coordinate_transformation_mode": mode,
        "rounding_method": "floor" if call.opset < 11 else rounding,
        "cubic_alpha": call.attributes.get("cubic_coeff_a", -0.75),
        "cubic_exclude": call.attributes.get("exclude_outside", 0),
        "extrapolation_value": call.attributes.get("extrapolation_value", 0.0),
    }
    n, c, *size = call.outputs[0].shape
    if rank == 5:
        return op.image.resize3d(call.inputs[0], size, roi=roi, layout="NCDHW", **options)
    data = call.inputs[0]
    if rank == 3:
        data = op.reshape(data, [n, c, 1, call.shape()[2]])
        size = [1, *size]
        roi = None if roi is None else [0.0, roi[0], 1.0, roi[1]]
    result = op.image.resize2d(data, size, roi=roi, layout="NCHW", **options)
    return op.reshape(result, call.outputs[0].shape) if rank == 3 else result


def _spatial_roi(call: Call, rank: int) -> list[float]:
    """Return the starts, then the ends, of the spatial axes' region."""
    value = call.value(1)
    given = [] if value is None else [float(v) for v in value]
    axes = call.attributes.get("axes") or list(range(rank))
    starts, ends = [0.0] * rank, [1.0] * rank
    for axis, start, end in zip(axes, given[: len(axes)], given[len(axes) :], strict=True):
        starts[axis], ends[axis] = start, end
    return [*starts[2:], *ends[2:]]
