"""Resizing in both layouts against numpy: every coordinate and rounding mode, up and down."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from tvm import relax

from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC

RunOp = Callable[..., tuple[np.ndarray, list[str]]]

SIZES = [
    ((3, 3, 7, 5), (11, 13)),
    ((3, 17, 11, 13), (7, 5)),
    ((1, 17, 1, 1), (5, 3)),
    ((2, 3, 7, 5), (1, 1)),
    ((1, 17, 9, 7), (18, 21)),
    ((1, 33, 10, 12), (5, 4)),
]
MODES = ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "tf_half_pixel_for_nn"]
ROUNDINGS = {
    "floor": math.floor,
    "ceil": math.ceil,
    "round_prefer_floor": lambda p: math.ceil(p - Fraction(1, 2)),
    "round_prefer_ceil": lambda p: math.floor(p + Fraction(1, 2)),
}


def positions(source: int, target: int, mode: str) -> list[Fraction]:
    """Return the position in the input of each element, as ONNX defines it."""
    half, scale = Fraction(1, 2), Fraction(source, target)
    return [
        {
            "half_pixel": (o + half) * scale - half,
            "asymmetric": o * scale,
            "align_corners": Fraction(o * (source - 1), max(target - 1, 1)),
            "pytorch_half_pixel": (o + half) * scale - half if target > 1 else Fraction(0),
            "tf_half_pixel_for_nn": (o + half) * scale,
        }[mode]
        for o in range(target)
    ]


def matrix(
    source: int, target: int, mode: str, method: str, rounding: str, exclude: bool = False
) -> np.ndarray:
    """Return the weights ``[target, source]`` of one axis."""
    result = np.zeros((target, source))
    alpha = -0.75
    for o, p in enumerate(positions(source, target, mode)):
        below, t = math.floor(p), float(p - math.floor(p))
        if method == "nearest_neighbor":
            taps = {ROUNDINGS[rounding](p): 1.0}
        elif method == "linear":
            taps = {below: 1 - t, below + 1: t}
        else:
            taps = {}
            for index in range(below - 1, below + 3):
                d = abs(float(p - index))
                if d <= 1:
                    taps[index] = (alpha + 2) * d**3 - (alpha + 3) * d**2 + 1
                else:
                    taps[index] = alpha * (d**3 - 5 * d**2 + 8 * d - 4)
            if exclude:
                taps = {i: w for i, w in taps.items() if 0 <= i < source}
                taps = {i: w / sum(taps.values()) for i, w in taps.items()}
        for index, weight in taps.items():
            result[o, min(max(index, 0), source - 1)] += weight
    return result


def resized(
    x: np.ndarray, size: tuple[int, int], mode: str, method: str, rounding: str = "floor",
    exclude: bool = False,
) -> np.ndarray:  # fmt: skip
    rows, columns = (
        matrix(n, m, mode, method, rounding, exclude)
        for n, m in zip(x.shape[2:], size, strict=True)
    )
    return np.einsum("nchw,yh,xw->ncyx", x.astype("float64"), rows, columns)


def check(
    run_op: RunOp, data: np.ndarray, size: tuple[int, int], layout: str, method: str,
    mode: str, rounding: str = "floor", exclude: bool = False,
) -> None:  # fmt: skip
    given = data if layout == "NCHW" else data.transpose(0, 2, 3, 1).copy()
    actual, rules = run_op(
        lambda v: relax.op.image.resize2d(
            v, size, layout=layout, method=method, coordinate_transformation_mode=mode,
            rounding_method=rounding, cubic_alpha=-0.75, cubic_exclude=int(exclude),
        ),
        given,
    )  # fmt: skip
    assert rules == ["resize"]
    exact = resized(data, size, mode, method, rounding, exclude)
    exact = exact if layout == "NCHW" else exact.transpose(0, 2, 3, 1)
    if method == "nearest_neighbor":
        np.testing.assert_array_equal(actual, exact)
    else:
        np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("shape", "size"), SIZES, ids=str)
@pytest.mark.parametrize("method", ["nearest_neighbor", "linear", "cubic"])
def test_resizing_equals_the_oracle(
    method: str, shape: tuple[int, ...], size: tuple[int, int], layout: str,
    run_op: RunOp, rng: np.random.Generator,
) -> None:  # fmt: skip
    data = rng.standard_normal(shape).astype("float32")
    check(run_op, data, size, layout, method, "half_pixel", "round_prefer_floor")


@pytest.mark.parametrize("method", ["nearest_neighbor", "linear"])
def test_positions_of_a_long_row_exceed_no_integer(method: str, run_op: RunOp) -> None:
    # The numerators reach 40 000 x 80 000.
    source, target = 40_000, 80_000
    data = np.tile(np.arange(source, dtype="float32"), (1, 1, 2, 1))
    actual, _ = run_op(
        lambda v: relax.op.image.resize2d(
            v, (2, target), layout="NCHW", method=method, rounding_method="floor",
            coordinate_transformation_mode="align_corners",
        ),
        data,
    )  # fmt: skip
    exact = np.arange(target) * (source - 1) / (target - 1)
    exact = np.floor(exact + 1e-9) if method == "nearest_neighbor" else exact
    for row in actual[0, 0]:
        np.testing.assert_allclose(row, exact, rtol=1e-6, atol=1e-3)


def narrow(mode: str) -> int:
    # TVM's constant folding divides by zero for a width of 1 and aligned corners.
    return 2 if mode == "align_corners" else 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_mode_of_nearest_equals_the_oracle(
    rounding: str, mode: str, run_op: RunOp, rng: np.random.Generator
) -> None:
    data = rng.standard_normal((1, 3, 6, 5)).astype("float32")
    check(run_op, data, (9, 10), "NCHW", "nearest_neighbor", mode, rounding)
    check(run_op, data, (4, narrow(mode)), "NHWC", "nearest_neighbor", mode, rounding)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_every_mode_of_interpolation_equals_the_oracle(
    method: str, mode: str, run_op: RunOp, rng: np.random.Generator
) -> None:
    data = rng.standard_normal((1, 3, 6, 5)).astype("float32")
    check(run_op, data, (9, 10), "NCHW", method, mode)
    check(run_op, data, (4, narrow(mode)), "NHWC", method, mode)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_cubic_weights_outside_the_image_can_be_excluded(
    layout: str, run_op: RunOp, rng: np.random.Generator
) -> None:
    data = rng.standard_normal((2, 3, 7, 5)).astype("float32")
    check(run_op, data, (14, 13), layout, "cubic", "half_pixel", exclude=True)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int64", "float16"])
def test_nearest_of_any_type_is_exact(
    dtype: str, layout: str, run_op: RunOp, rng: np.random.Generator
) -> None:
    data = rng.integers(0, 100, (1, 17, 7, 5)).astype(dtype)
    check(run_op, data, (14, 10), layout, "nearest_neighbor", "asymmetric")


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_operators_behind_join_the_kernel(
    layout: str, run_op: RunOp, rng: np.random.Generator
) -> None:
    data = rng.standard_normal((1, 17, 7, 5)).astype("float32")
    large = resized(data, (14, 15), "half_pixel", "linear")
    other = rng.standard_normal(large.shape).astype("float32")
    exact = np.maximum(large + other, 0)
    order = (0, 1, 2, 3) if layout == "NCHW" else (0, 2, 3, 1)
    actual, rules = run_op(
        lambda x, y: relax.op.nn.relu(
            relax.op.add(relax.op.image.resize2d(x, (14, 15), layout=layout, method="linear"), y)
        ),
        data.transpose(order).copy(),
        other.transpose(order).copy(),
    )
    assert rules == ["resize"]
    np.testing.assert_allclose(actual, exact.transpose(order), rtol=1e-5, atol=5e-6)


def test_a_crop_keeps_the_legalization_of_tvm(run_op: RunOp, rng: np.random.Generator) -> None:
    data = rng.standard_normal((1, 3, 5, 7)).astype("float32")
    actual, rules = run_op(
        lambda v: relax.op.image.resize2d(
            v, (3, 4), roi=[0.0, 0.0, 0.5, 0.5], method="linear",
            coordinate_transformation_mode="tf_crop_and_resize",
        ),
        data,
    )  # fmt: skip
    assert "resize" not in rules
    np.testing.assert_allclose(actual[0, :, 0, 0], data[0, :, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(actual[0, :, 2, 3], data[0, :, 2, 3], rtol=1e-6)


def test_resizing_between_convolutions_is_in_nhwc(rng: np.random.Generator) -> None:
    x = relax.Var("x", relax.TensorType((1, 4, 5, 7), "float32"))
    weight = relax.const(rng.standard_normal((4, 4, 3, 3)).astype("float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            small = builder.emit(relax.op.nn.conv2d(x, weight, padding=1))
            large = builder.emit(relax.op.image.resize2d(small, (10, 14), method="linear"))
            result = builder.emit_output(relax.op.nn.conv2d(large, weight, padding=1))
        builder.emit_func_output(result)
    module = apply(builder.get(), ToNHWC())
    calls = [binding.value for binding in module["main"].body.blocks[0].bindings]
    names = [str(call.op.name) for call in calls]
    assert names.count("relax.permute_dims") == 2
    (call,) = [call for call in calls if call.op.name == "relax.image.resize2d"]
    assert call.attrs.layout == "NHWC"
