"""Lowers bilinear sampling at given points: what the points are is computed once for all channels.

Rewrites ``relax.image.grid_sample`` of NCHW float32 images, bilinear, with zeros or the border
outside; others keep TVM's lowering. A first kernel writes the four neighbours of each point and
their weights, a second one reads them for each channel. Runs before fusion. Numerics: sums may be
taken in another order; a neighbour outside counts as 0 whatever the image holds, and so does one
at a coordinate that is infinite or no number. With the border, no number is the first pixel.
"""

from __future__ import annotations

from functools import partial

from tvm import relax, te, tirx

from .anchors import default_legalization

# kOpaque of relax's OpPatternKind: joined to the second kernel, the first would run again for each
# channel.
_APART = {"op_pattern": 8}
_OUTSIDE = -1


def _points(
    grid: te.Tensor, *, height: int, width: int, border: bool, align: bool
) -> list[te.Tensor]:
    """Return positions in an image, int32, and weights of the neighbours, ``[N, 4, H', W']``."""
    batch, _, *size = grid.shape
    zero, half, one = (tirx.const(value, "float32") for value in (0.0, 0.5, 1.0))

    def coordinate(axis: int, extent: int, at: tuple[tirx.Expr, ...]) -> tirx.Expr:
        n, h, w = at
        turn = (grid[n, axis, h, w] + one) * half
        last = tirx.const(extent - 1, "float32")
        value = turn * last if align else turn * tirx.const(extent, "float32") - half
        if not border:
            return value
        # No number is not greater than 0.
        return tirx.Select(value > zero, tirx.min(value, last), zero)

    def neighbour(axis: int, extent: int, step: tirx.Expr, at: tuple[tirx.Expr, ...]) -> tirx.Expr:
        # Of what lies far outside, or is no number, an index that does as well.
        floor = tirx.floor(coordinate(axis, extent, at))
        least = tirx.const(-2.0, "float32")
        floor = tirx.Select(floor > least, tirx.min(floor, extent), least)
        return floor.astype("int32") + step

    def share(axis: int, extent: int, step: tirx.Expr, at: tuple[tirx.Expr, ...]) -> tirx.Expr:
        value = coordinate(axis, extent, at)
        part = value - tirx.floor(value)
        # Of what is infinite or no number, the difference is no number.
        part = tirx.Select(part >= zero, part, zero)
        return tirx.Select(step > 0, part, one - part)

    def position(n: tirx.Expr, k: tirx.Expr, h: tirx.Expr, w: tirx.Expr) -> tirx.Expr:
        k = k.astype("int32")
        y = neighbour(1, height, tirx.indexdiv(k, 2), (n, h, w))
        x = neighbour(0, width, tirx.indexmod(k, 2), (n, h, w))
        inside = tirx.all(y >= 0, y < height, x >= 0, x < width)
        return tirx.Select(inside, y * width + x, tirx.const(_OUTSIDE, "int32"))

    def weight(n: tirx.Expr, k: tirx.Expr, h: tirx.Expr, w: tirx.Expr) -> tirx.Expr:
        down = share(1, height, tirx.indexdiv(k, 2), (n, h, w))
        return down * share(0, width, tirx.indexmod(k, 2), (n, h, w))

    shape = (batch, 4, *size)
    return [
        te.compute(shape, position, name="grid_position"),
        te.compute(shape, weight, name="grid_weight"),
    ]


def _sampled(image: te.Tensor, position: te.Tensor, weight: te.Tensor) -> te.Tensor:
    """Return ``[N, C, H', W']`` of an image ``[N, C, H W]``."""
    batch, channels, _ = image.shape

    def element(n: tirx.Expr, c: tirx.Expr, h: tirx.Expr, w: tirx.Expr) -> tirx.Expr:
        total = tirx.const(0.0, "float32")
        for k in range(4):
            at = position[n, k, h, w]
            value = image[n, c, tirx.max(at, 0)]
            value = tirx.Select(at >= 0, value, tirx.const(0.0, "float32"))
            total = total + value * weight[n, k, h, w]
        return total

    return te.compute((batch, channels, *position.shape[2:]), element, name="grid_sample")


def legalize_grid_sample(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize one ``relax.image.grid_sample`` call. See the module."""
    image, grid = call.args
    attrs = call.attrs
    fits = (
        attrs.method == "bilinear"
        and attrs.layout == "NCHW"
        and attrs.padding_mode in ("zeros", "border")
        and all(str(e.ty.dtype) == "float32" for e in (image, grid))
        and len(image.ty.shape) == 4
    )
    if not fits:
        return default_legalization(bb, call)
    batch, channels, height, width = (int(extent) for extent in image.ty.shape)
    points = bb.emit(
        bb.call_te(
            partial(
                _points,
                height=height,
                width=width,
                border=attrs.padding_mode == "border",
                align=bool(attrs.align_corners),
            ),
            grid,
            primfunc_name_hint="grid_points",
            primfunc_attrs=_APART,
        )
    )
    flat = bb.emit(relax.op.reshape(image, (batch, channels, height * width)))
    position, weight = (bb.emit(relax.TupleGetItem(points, index)) for index in (0, 1))
    return bb.call_te(_sampled, flat, position, weight, primfunc_name_hint="grid_sample")
