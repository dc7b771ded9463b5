"""Winograd's transforms: exact in exact arithmetic, and how much float32 loses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from tvm import relax

from hone import pipeline
from hone.passes.lower import conv2d as conv2d_module
from hone.passes.lower.window import Window
from hone.passes.lower.winograd import choose_transform
from hone.passes.lower.winograd_transforms import F2, F4, F4_ROUNDED, Transform
from hone.passes.lower.winograd_weights import round_points, transform_rows, transform_weight
from hone.targets.half_dot import HalfDot
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.winograd_model import Form
from hone.targets.target import resolve
from hone.weights import weights_bytes

RunOp = Callable[..., tuple[np.ndarray, list[str]]]


def output_matrix(transform: Transform) -> np.ndarray:
    """Return ``A^T``: powers of the finite points, and infinity in the last row."""
    rows = [[point**power for point in transform.finite] for power in range(transform.tile)]
    last = [[0.0]] * (transform.tile - 1) + [[1.0]]
    return np.concatenate([rows, last], axis=1)


@pytest.mark.parametrize("transform", [F2, F4, F4_ROUNDED], ids=["F2", "F4", "F4 rounded"])
def test_transforms_give_the_convolution_of_one_tile(
    transform: Transform, rng: np.random.Generator
) -> None:
    data = rng.standard_normal((transform.side, transform.side))
    taps = rng.standard_normal((3, 3))
    to_points, weight = np.array(transform.data), transform.weight
    points = (weight @ taps @ weight.T) * (to_points @ data @ to_points.T)
    back = output_matrix(transform)
    exact = sum(
        taps[r, s] * data[r : r + transform.tile, s : s + transform.tile]
        for r in range(3)
        for s in range(3)
    )
    np.testing.assert_allclose(back @ points @ back.T, exact, rtol=1e-12, atol=1e-12)


def test_weights_are_packed_by_point_and_rounded_with_zeros(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((5, 3, 3, 2)).astype("float32")
    packed = transform_weight(weight, F2, 4)
    assert packed.shape == (4, 4, 2, 2, 4)
    assert not packed[:, :, 1, :, 1:].any()
    # The first and last points take the corner taps as they are.
    np.testing.assert_array_equal(packed[0, 0, 0, :, 3], weight[3, 0, 0])
    np.testing.assert_array_equal(packed[3, 3, 1, :, 0], weight[4, 2, 2])


def points_of(weight: np.ndarray, transform: Transform) -> np.ndarray:
    """Return ``G g G^T`` of ``[K, 3, 3, C]`` as ``[m + 2, m + 2, K, C]``."""
    return np.einsum("xr,krsc,ys->xykc", transform.weight, weight, transform.weight)


@pytest.mark.parametrize(
    ("transform", "gain"), [(F2, 0.9), (F4_ROUNDED, 0.7)], ids=["F2", "F4 rounded"]
)
def test_rounded_points_make_up_for_each_other(
    transform: Transform, gain: float, rng: np.random.Generator
) -> None:
    # Measured 0.87 and 0.66 of the error of rounding each point to nearest.
    side, dtype = transform.side, np.dtype(ml_dtypes.bfloat16)
    data = np.maximum(rng.standard_normal((500, 16, side, side)), 0)
    matrix, back = np.array(transform.data), output_matrix(transform)
    tiles = np.einsum("xi,ncij,yj->ncxy", matrix, data, matrix)
    points = points_of(rng.standard_normal((8, 3, 3, 16)), transform)

    def error(rounded: np.ndarray) -> float:
        off = rounded.astype("float64") - points
        sums = np.einsum("xykc,ncxy->nkxy", off, tiles)
        return float(np.square(np.einsum("ix,nkxy,jy->nkij", back, sums, back)).mean()) ** 0.5

    nearest = error(points.astype(dtype))
    assert error(round_points(points, transform, dtype)) < gain * nearest


def test_points_that_16_bits_hold_stay_as_they_are(rng: np.random.Generator) -> None:
    weight = 16.0 * rng.integers(-3, 4, (5, 3, 3, 2))
    exact = points_of(weight, F2)
    np.testing.assert_array_equal(round_points(exact, F2, np.dtype("float16")), exact)


def test_weights_in_16_bits_are_rounded_points(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((4, 3, 3, 2)).astype(ml_dtypes.bfloat16)
    packed = transform_weight(weight, F4_ROUNDED, 4)
    expected = round_points(
        points_of(weight.astype("float64"), F4_ROUNDED), F4_ROUNDED, packed.dtype
    )
    np.testing.assert_array_equal(packed[:, :, 0].swapaxes(2, 3), expected)


def test_weights_by_rows_become_points_when_their_columns_are_transformed(
    rng: np.random.Generator,
) -> None:
    weight = rng.standard_normal((5, 3, 3, 2)).astype("float32")
    for transform in (F2, F4):
        rows = transform_rows(weight, transform, 4)
        assert rows.shape == (2, transform.side, 3, 2, 4)
        assert not rows[1, ..., 1:].any()
        along = np.einsum("ys,bxsct->xybct", transform.weight, rows)
        np.testing.assert_allclose(along, transform_weight(weight, transform, 4), rtol=1e-4)


FORMS = [
    (Form(tile=2), 1e-6), (Form(tile=4), 4e-6),
    (Form(tile=2, rows=True), 1e-6), (Form(tile=4, rows=True), 4e-6),
]  # fmt: skip


@pytest.mark.parametrize(("form", "bound"), FORMS, ids=lambda value: getattr(value, "name", ""))
def test_error_stays_near_that_of_a_direct_sum_when_layers_are_deep(
    form: Form, bound: float, run_op: RunOp, rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Measured 3e-7 and 1.4e-6 of the largest output; a direct float32 sum of 9 x 128 terms has
    # 8e-7. Lavin's points would give 7e-6 for F4.
    monkeypatch.setattr(conv2d_module, "choose_form", lambda *_, **__: form)
    x = np.maximum(rng.standard_normal((1, 128, 9, 10)), 0).astype("float32")
    weight = rng.standard_normal((32, 128, 3, 3)).astype("float32")
    padded = np.pad(x.astype("float64"), ((0, 0), (0, 0), (1, 1), (1, 1)))
    exact = sum(
        np.einsum("nchw,kc->nkhw", padded[:, :, r : r + 9, s : s + 10], weight[:, :, r, s])
        for r in range(3)
        for s in range(3)
    )
    actual, rules = run_op(
        lambda v: relax.op.nn.conv2d(v, relax.const(weight), padding=(1, 1, 1, 1)), x
    )
    assert ("winograd_rows" if form.rows else "winograd") in rules
    assert np.abs(actual - exact).max() <= bound * np.abs(exact).max()


@pytest.mark.parametrize(
    ("shape", "channels", "padding"),
    [((3, 13, 7, 5), 96, (1, 1, 1, 1)), ((1, 7, 3, 3), 32, (0, 0, 0, 0)),
     ((1, 17, 12, 19), 64, (2, 0, 1, 3)), ((2, 3, 1, 1), 32, (1, 1, 1, 1))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("tile", [2, 4])
def test_weights_by_rows_equal_the_oracle_with_bias_residual_and_relu(
    shape: tuple[int, ...], channels: int, padding: tuple[int, ...], tile: int, run_op: RunOp,
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    form = Form(tile=tile, rows=True)
    monkeypatch.setattr(conv2d_module, "choose_form", lambda *_, **__: form)
    x = rng.standard_normal(shape).astype("float32")
    weight = rng.standard_normal((channels, shape[1], 3, 3)).astype("float32")
    bias = rng.standard_normal((1, channels, 1, 1)).astype("float32")
    top, left, bottom, right = padding
    padded = np.pad(x.astype("float64"), ((0, 0), (0, 0), (top, bottom), (left, right)))
    height, width = padded.shape[2] - 2, padded.shape[3] - 2
    exact = sum(
        np.einsum("nchw,kc->nkhw", padded[:, :, r : r + height, s : s + width], weight[:, :, r, s])
        for r in range(3)
        for s in range(3)
    )
    other = rng.standard_normal(exact.shape).astype("float32")

    def make(v: relax.Expr, w: relax.Expr) -> relax.Expr:
        y = relax.op.nn.conv2d(v, relax.const(weight), padding=padding)
        return relax.op.nn.relu(relax.op.add(relax.op.add(y, relax.const(bias)), w))

    actual, rules = run_op(make, x, other)
    assert "winograd_rows" in rules
    # 4e-6 of the largest output for F(4x4), see above.
    atol = 4e-6 * np.abs(exact).max()
    np.testing.assert_allclose(actual, np.maximum(exact + bias + other, 0), rtol=1e-5, atol=atol)


def test_a_layer_by_rows_keeps_half_the_weights_of_its_points(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((64, 64, 3, 3)).astype("float32")
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 64, 14, 14), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(relax.op.nn.conv2d(x, relax.const(weight), padding=1))
        builder.emit_func_output(y)
    module, target = builder.get(), resolve("x86-64-v4")
    point = "winograd 1x14x14x64 to 64"
    by_rows, points = (
        weights_bytes(pipeline.lower(module, target, threads=2, decided={point: name}))
        for name in ("4x4 rows", "4x4")
    )
    assert by_rows == weight.nbytes * 18 // 9
    assert points == weight.nbytes * 36 // 9


def test_compact_lowering_keeps_the_direct_convolution_and_its_smaller_weights(
    rng: np.random.Generator,
) -> None:
    target = resolve("x86-64-v4")
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 64, 56, 56), "float32"))
    weight = rng.standard_normal((64, 64, 3, 3)).astype("float32")
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(relax.op.nn.conv2d(x, relax.const(weight), padding=1))
        builder.emit_func_output(y)
    module = builder.get()
    fast = weights_bytes(pipeline.lower(module, target, threads=2))
    small = weights_bytes(pipeline.lower(module, target, threads=2, compact=True))
    assert small == weight.nbytes
    assert fast > 1.5 * small


def test_large_tiles_are_taken_in_bfloat16_where_the_products_are_exact_or_the_caller_asks() -> (
    None
):
    window = Window(
        shape=(1, 56, 56, 64), taps=(3, 3), strides=(1, 1), padding=(1, 1, 1, 1), dilation=(1, 1)
    )
    wide = Machine.of(resolve("x86-64-v4"), threads=2)
    pairs = replace(wide, half_dot=HalfDot.VDPBF16PS)

    def chosen(machine: Machine, dtype: str, **options: bool) -> Transform | None:
        return choose_transform(machine, window, channels=64, dtype=dtype, **options)

    assert chosen(wide, "float32") is F4
    assert chosen(wide, "bfloat16") is F4_ROUNDED
    assert chosen(pairs, "bfloat16") is F2
    assert chosen(pairs, "bfloat16", large_tiles=True) is F4_ROUNDED
    assert chosen(pairs, "float16") is F4_ROUNDED
