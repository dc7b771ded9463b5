"""Which input rows an operator reads for a range of its output rows, and the operator on them.

The rules that `SplitPatches` rests on. An image is NCHW; rows are its axis 2. Numerics: exact, each
output element is the same sum of the same products.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir import GenericConst

from .dataflow import shape_of, with_args

ROWS = 2

_CONV2D = tvm.ir.Op.get("relax.nn.conv2d")
_MAX_POOL = tvm.ir.Op.get("relax.nn.max_pool2d")
_AVG_POOL = tvm.ir.Op.get("relax.nn.avg_pool2d")
_ELEMENTWISE = tuple(
    tvm.ir.Op.get(f"relax.{name}")
    for name in (
        *("abs", "add", "clip", "divide", "erf", "exp", "floor", "log", "maximum", "minimum"),
        *("multiply", "negative", "nn.gelu", "nn.gelu_tanh", "nn.leakyrelu", "nn.relu", "nn.silu"),
        *("nn.softplus", "power", "round", "rsqrt", "sigmoid", "sqrt", "subtract", "tanh"),
    )
)


@dataclass(frozen=True, order=True)
class Rows:
    """Rows of an image, from ``first`` up to but not including ``end``."""

    first: int
    end: int

    def __or__(self, other: Rows) -> Rows:
        return Rows(min(self.first, other.first), max(self.end, other.end))

    def __len__(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, kw_only=True)
class Window:
    """How an operator's output rows follow from its input rows.

    Parameters
    ----------
    taps, stride, dilation, padding : int
        Along the rows; padding is that above the image.
    """

    taps: int = 1
    stride: int = 1
    dilation: int = 1
    padding: int = 0

    def reads(self, rows: Rows) -> Rows:
        """Return the input rows of some output rows; they may lie beyond the image.

        Examples
        --------
        A 3x3 convolution of stride 2 and padding 1 reads rows -1 to 5 for rows 0 to 2.

        >>> Window(taps=3, stride=2, padding=1).reads(Rows(0, 3))
        Rows(first=-1, end=6)
        """
        first = rows.first * self.stride - self.padding
        last = (rows.end - 1) * self.stride - self.padding + (self.taps - 1) * self.dilation
        return Rows(first, last + 1)


def window_of(call: relax.Call) -> Window | None:
    """Return the window of an operator that can be computed for some rows only, else None."""
    if call.op.same_as(_CONV2D):
        attrs = call.attrs
        weight = call.args[1]
        if (
            str(attrs.data_layout) != "NCHW"
            or str(attrs.out_layout) not in ("", "NCHW")
            or str(attrs.kernel_layout) != "OIHW"
            or not isinstance(weight, GenericConst)
        ):
            return None
        return Window(
            taps=shape_of(weight)[2],
            stride=int(attrs.strides[0]),
            dilation=int(attrs.dilation[0]),
            padding=int(attrs.padding[0]),
        )
    if call.op.same_as(_MAX_POOL) or call.op.same_as(_AVG_POOL):
        attrs = call.attrs
        if str(attrs.layout) != "NCHW" or bool(attrs.ceil_mode):
            return None
        return Window(
            taps=int(attrs.pool_size[0]),
            stride=int(attrs.strides[0]),
            dilation=int(attrs.dilation[0]),
            padding=int(attrs.padding[0]),
        )
    if any(call.op.same_as(op) for op in _ELEMENTWISE):
        return Window() if _keeps_rows(call) else None
    return None


def is_elementwise(call: relax.Call) -> bool:
    """Say whether an operator computes each element from those at the same place."""
    return any(call.op.same_as(op) for op in _ELEMENTWISE)


def is_image(expr: relax.Expr) -> bool:
    """Say whether an expression is a tensor of four static dimensions."""
    shape = getattr(expr.ty, "shape", None)
    return (
        isinstance(expr.ty, relax.TensorType)
        and isinstance(shape, relax.ShapeExpr)
        and len(shape) == 4
        and all(isinstance(extent, tvm.tirx.IntImm) for extent in shape)
    )


def _keeps_rows(call: relax.Call) -> bool:
    """Say whether each operand has all rows of the result, or is a constant that has none."""
    if not is_image(call):
        return False
    for operand in call.args:
        if isinstance(operand, relax.Var):
            if not is_image(operand) or shape_of(operand)[ROWS] != shape_of(call)[ROWS]:
                return False
        elif isinstance(operand, GenericConst):
            shape = shape_of(operand)
            if len(shape) > 1 and shape[-2] != 1:
                return False
    return True


def on_rows(call: relax.Call, operands: list[relax.Expr], *, above: int, below: int) -> relax.Call:
    """Return the operator on a part of its input.

    Parameters
    ----------
    call : relax.Call
        Has a window.
    operands : list of Expr
        Its operands, reduced to the rows that they need.
    above, below : int
        Rows of padding; less than before where the part does not reach the border.
    """
    if is_elementwise(call):
        return with_args(call, operands)
    attrs = call.attrs
    _, left, _, right = (int(size) for size in attrs.padding)
    shared = {
        "strides": [int(size) for size in attrs.strides],
        "padding": [above, left, below, right],
        "dilation": [int(size) for size in attrs.dilation],
    }
    if call.op.same_as(_CONV2D):
        return relax.op.nn.conv2d(
            *operands,
            **shared,
            groups=int(attrs.groups),
            data_layout=str(attrs.data_layout),
            kernel_layout=str(attrs.kernel_layout),
            out_layout=str(attrs.out_layout),
            out_dtype=attrs.out_dtype,
        )
    pool = relax.op.nn.max_pool2d if call.op.same_as(_MAX_POOL) else relax.op.nn.avg_pool2d
    return pool(
        *operands,
        **shared,
        pool_size=[int(size) for size in attrs.pool_size],
        ceil_mode=False,
        count_include_pad=bool(attrs.count_include_pad),
        layout=str(attrs.layout),
        out_layout=str(attrs.out_layout),
    )
