"""Kernels of 16-bit floats against a numpy oracle that rounds what they round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from tvm import relax

from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.graph.to_half import ToHalf
from hone.passes.lower.half_conv2d import by_planes
from hone.passes.lower.window import Window

RunOp = Callable[..., tuple[np.ndarray, list[str]]]

TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# Half of the distance between neighbouring numbers, relative.
UNIT = {"bfloat16": 2.0**-9, "float16": 2.0**-12}


@pytest.fixture(params=list(TYPES))
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return x.astype(TYPES[dtype]).astype("float64")


@dataclass(frozen=True, kw_only=True)
class Conv:
    id: str
    x: tuple[int, int, int, int]
    k: int
    taps: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    inner: bool = True

    def windows(self, x: np.ndarray) -> np.ndarray:
        """Return ``[N, H, W, C, R, S]`` of padded NCHW data."""
        top, left, bottom, right = self.padding
        padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        span = [(t - 1) * d + 1 for t, d in zip(self.taps, self.dilation, strict=True)]
        view = np.lib.stride_tricks.sliding_window_view(padded, span, axis=(2, 3))
        view = view[:, :, :: self.strides[0], :: self.strides[1]]
        view = view[..., :: self.dilation[0], :: self.dilation[1]]
        return view.transpose(0, 2, 3, 1, 4, 5)

    def oracle(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Return the convolution as NCHW."""
        return np.einsum("nhwcrs,kcrs->nkhw", self.windows(x), weight)


CONVS = [
    Conv(id="primes", x=(1, 7, 13, 11), k=5),
    Conv(id="one pixel", x=(1, 3, 1, 1), k=17, taps=(1, 1), padding=(0, 0, 0, 0)),
    Conv(id="one even pixel", x=(1, 6, 1, 1), k=17, taps=(1, 1), padding=(0, 0, 0, 0)),
    Conv(id="batch of three, strided, odd size", x=(3, 6, 7, 6), k=24, strides=(2, 2)),
    Conv(id="one by one, strided", x=(1, 32, 9, 9), k=48, taps=(1, 1), strides=(2, 2),
         padding=(0, 0, 0, 0)),
    Conv(id="uneven padding", x=(1, 4, 8, 9), k=8, taps=(4, 3), padding=(2, 0, 1, 3)),
    Conv(id="dilated", x=(1, 4, 14, 12), k=20, dilation=(3, 2), padding=(3, 2, 3, 2)),
    Conv(id="a network's input", x=(1, 3, 17, 19), k=10, taps=(7, 2), strides=(2, 2),
         padding=(3, 0, 3, 1), inner=False),
    Conv(id="inputs in a batch", x=(3, 1, 8, 8), k=16, inner=False),
    Conv(id="a dilated input", x=(1, 3, 9, 9), k=8, dilation=(2, 2), inner=False),
    Conv(id="a wide input", x=(1, 3, 24, 40), k=32, taps=(7, 7), strides=(2, 2),
         padding=(3, 3, 3, 3), inner=False),
    Conv(id="an input of many channels, one by one", x=(1, 32, 6, 5), k=24, taps=(1, 1),
         padding=(0, 0, 0, 0), inner=False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("depth", "taps", "dilation", "expected"),
    [(3, 7, 1, True), (3, 3, 1, True), (64, 1, 1, False), (4, 3, 1, False), (3, 7, 2, False)],
)
def test_planes_are_read_where_pairs_of_taps_are_no_more_than_pairs_of_channels(
    depth: int, taps: int, dilation: int, expected: bool
) -> None:
    window = Window(
        shape=(1, 9, 9, depth), taps=(taps, taps), strides=(1, 1), dilation=(1, dilation),
        padding=(0, 0, 0, 0),
    )  # fmt: skip
    assert by_planes(window) is expected


@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.id)
def test_conv2d_equals_the_oracle_of_rounded_operands(
    case: Conv, dtype: str, run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal(case.x).astype("float32")
    weight = rng.standard_normal((case.k, case.x[1], *case.taps)).astype("float32")
    bias = rng.standard_normal((1, case.k, 1, 1)).astype("float32")
    data = np.maximum(x, 0) if case.inner else x
    exact = case.oracle(rounded(data, dtype), rounded(weight, dtype))
    other = rng.standard_normal(exact.shape).astype("float32")

    def make(x: relax.Expr, other: relax.Expr) -> relax.Expr:
        y = relax.op.nn.conv2d(
            relax.op.nn.relu(x) if case.inner else x, relax.const(weight), strides=case.strides,
            padding=case.padding, dilation=case.dilation,
        )  # fmt: skip
        return relax.op.nn.relu(relax.op.add(relax.op.add(y, relax.const(bias)), other))

    actual, rules = run_op(make, x, other, passes=[ToNHWC(), ToHalf(dtype=dtype)])
    assert "conv2d" in rules
    # A float32 sum of n terms of size about 1 is off by at most n units of 2**-24 times the sum
    # of magnitudes; the longest sums here have 147 terms.
    np.testing.assert_allclose(actual, np.maximum(exact + bias + other, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "groups"),
    [
        (Conv(id="depthwise", x=(1, 19, 13, 11), k=19), 19),
        (Conv(id="depthwise", x=(2, 32, 12, 14), k=32, strides=(2, 2)), 32),
        (Conv(id="grouped", x=(1, 12, 9, 7), k=18), 3),
    ],
    ids=str,
)
def test_grouped_convolutions_read_16_bit_floats(
    case: Conv, groups: int, dtype: str, run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal(case.x).astype("float32")
    weight = rng.standard_normal((case.k, case.x[1] // groups, *case.taps)).astype("float32")

    def make(x: relax.Expr) -> relax.Expr:
        data = relax.op.astype(relax.op.astype(x, dtype), "float32")
        return relax.op.nn.conv2d(
            data, relax.const(weight.transpose(0, 2, 3, 1).copy()), strides=case.strides,
            padding=case.padding, groups=groups, data_layout="NHWC", kernel_layout="OHWI",
        )  # fmt: skip

    actual, rules = run_op(make, x.transpose(0, 2, 3, 1).copy())
    assert ("window" if groups == case.k else "conv2d") in rules
    parts = zip(np.split(rounded(x, dtype), groups, 1), np.split(weight, groups), strict=True)
    exact = np.concatenate([case.oracle(data, factor) for data, factor in parts], 1)
    np.testing.assert_allclose(actual.transpose(0, 3, 1, 2), exact, rtol=1e-4, atol=1e-4)


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """Those of Winograd's form of 3x3 layers, see Lavin and Gray 2016, section 4."""

    data: np.ndarray
    weight: np.ndarray
    output: np.ndarray

    @classmethod
    def of(cls, *points: float) -> Matrices:
        """Return those of interpolation at some points and at infinity."""
        m = len(points) - 1
        rows = [np.poly([b for b in points if b != a])[::-1] for a in points]
        scales = [np.prod([a - b for b in points if b != a]) for a in points]
        data = np.zeros((m + 2, m + 2))
        data[:-1, :-1], data[-1] = rows, np.poly(points)[::-1]
        weight = [[a**k / scale for k in range(3)] for a, scale in zip(points, scales, strict=True)]
        output = np.array([[a**i for a in points] + [float(i == m - 1)] for i in range(m)])
        return cls(data=data, weight=np.array([*weight, [0, 0, 1]]), output=output)

    def magnitudes(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Return ``|A^T| (sum over c of |B^T d B| * |G g G^T|) |A|`` for NCHW data padded by 1."""
        height, width = x.shape[2:]
        m, side = self.output.shape
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1 - height % -m), (1, 1 - width % -m)))
        view = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(2, 3))
        points = np.abs(
            np.einsum("xi,ncabij,yj->nabcxy", self.data, view[:, :, ::m, ::m], self.data)
        )
        factors = np.abs(np.einsum("xr,kcrs,ys->kcxy", self.weight, weight, self.weight))
        sums = np.einsum("nabcxy,kcxy->nkabxy", points, factors, optimize=True)
        back = np.abs(self.output)
        tiles = np.einsum("ix,nkabxy,jy->nkaibj", back, sums, back)
        n, k, a, _, b, _ = tiles.shape
        return tiles.reshape(n, k, m * a, m * b)[:, :, :height, :width]


TILES = {
    False: Matrices.of(0, 1, -1),
    True: Matrices.of(0, 5 / 8, -5 / 8, 3 / 2, -3 / 2),
}


@pytest.mark.parametrize("large_tiles", TILES, ids=["2x2", "4x4"])
@pytest.mark.parametrize(
    ("x", "k"),
    [((1, 64, 29, 31), 64), ((3, 64, 13, 11), 72), ((1, 128, 7, 7), 144), ((1, 64, 16, 16), 64)],
    ids=str,
)
def test_winograd_stays_within_the_rounding_of_its_points(
    x: tuple[int, int, int, int], k: int, large_tiles: bool, run_op: RunOp, rng: np.random.Generator
) -> None:
    data = rng.standard_normal(x).astype("float32")
    weight = rng.standard_normal((k, x[1], 3, 3)).astype("float32")
    case = Conv(id="", x=x, k=k)
    values, factors = rounded(data, "bfloat16"), rounded(weight, "bfloat16")

    def make(x: relax.Expr) -> relax.Expr:
        return relax.op.nn.conv2d(relax.op.add(x, relax.const(0.0)), relax.const(weight), padding=1)

    actual, rules = run_op(make, data, passes=[ToNHWC(), ToHalf(large_tiles=large_tiles)])
    assert "winograd" in rules
    # A transformed value is off by one unit at most. So is a weight, but for what points before it
    # left over: less than another unit on the average, and thousands of them are summed up.
    bound = 2.01 * UNIT["bfloat16"] * TILES[large_tiles].magnitudes(values, factors)
    error = np.abs(actual - case.oracle(values, factors))
    assert (error <= bound + 1e-4).all()
    # Errors of either sign cancel: a tenth of the bound is a fault that no rounding explains.
    assert error.mean() < 0.1 * bound.mean()


@pytest.mark.parametrize(
    ("x", "k"),
    [((1, 7), 3), ((1, 64), 10), ((5, 32), 17), ((197, 24), 40), ((2, 37, 18), 23),
     ((64, 1, 8), 16), ((1, 128, 96), 160)],
    ids=str,
)  # fmt: skip
def test_dense_equals_the_oracle_of_rounded_operands(
    x: tuple[int, ...], k: int, dtype: str, run_op: RunOp, rng: np.random.Generator
) -> None:
    data = rng.standard_normal(x).astype("float32")
    weight = rng.standard_normal((x[-1], k)).astype("float32")
    bias = rng.standard_normal(k).astype("float32")
    actual, rules = run_op(
        lambda v: relax.op.add(relax.op.matmul(v, relax.const(weight)), relax.const(bias)),
        data,
        passes=[ToHalf(dtype=dtype)],
    )
    assert {"dense", "single_row"} & set(rules)
    exact = rounded(data, dtype) @ rounded(weight, dtype) + bias
    np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("left", "right"),
    [((2, 5, 7), (2, 7, 3)), ((1, 3, 37, 16), (1, 3, 16, 37)), ((3, 16, 16), (3, 16, 32)),
     ((1, 1, 2), (1, 2, 1)), ((1, 4, 128, 64), (1, 4, 64, 128))],
    ids=str,
)  # fmt: skip
def test_batch_matmul_equals_the_oracle_of_rounded_operands(
    left: tuple[int, ...], right: tuple[int, ...], dtype: str, run_op: RunOp,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    a = rng.standard_normal(left).astype("float32")
    b = rng.standard_normal(right).astype("float32")
    actual, rules = run_op(
        lambda a, b: relax.op.multiply(relax.op.matmul(a, b), relax.const(0.5)), a, b,
        passes=[ToHalf(dtype=dtype)],
    )  # fmt: skip
    assert "batch_matmul" in rules
    exact = 0.5 * (rounded(a, dtype) @ rounded(b, dtype))
    np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-4)


def test_values_are_rounded_to_nearest_even_like_numpy(
    dtype: str, run_op: RunOp, rng: np.random.Generator
) -> None:
    ties = 1 + np.arange(64) * UNIT[dtype]
    tiny = rng.standard_normal(100) * 2.0**-14
    large = rng.standard_normal(100) * 2.0**14
    x = np.concatenate([ties, -ties, tiny, large, rng.standard_normal(673), [0.0]])
    x = x.astype("float32")

    def make(v: relax.Expr) -> relax.Expr:
        return relax.op.add(relax.op.astype(relax.op.astype(v, dtype), "float32"), relax.const(0.0))

    actual, _ = run_op(make, x)
    np.testing.assert_array_equal(actual, rounded(x, dtype).astype("float32"))


def test_layers_pass_16_bit_floats_to_each_other(
    dtype: str, run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((1, 8, 10, 10)).astype("float32")
    first = (rng.standard_normal((16, 8, 5, 5)) / 16).astype("float32")
    second = (rng.standard_normal((16, 16, 1, 1)) / 4).astype("float32")

    def make(x: relax.Expr) -> relax.Expr:
        y = relax.op.nn.conv2d(x, relax.const(first), padding=2)
        y = relax.op.nn.max_pool2d(relax.op.nn.relu(y), (2, 2), (2, 2))
        return relax.op.add(relax.op.nn.conv2d(y, relax.const(second)), y)

    actual, _ = run_op(make, x, passes=[ToNHWC(), ToHalf(dtype=dtype)])
    one = Conv(id="", x=x.shape, k=16, taps=(5, 5), padding=(2, 2, 2, 2))
    y = np.maximum(one.oracle(rounded(x, dtype), rounded(first, dtype)), 0)
    y = rounded(y.reshape(1, 16, 5, 2, 5, 2).max((3, 5)).astype("float32"), dtype)
    exact = np.einsum("nchw,kc->nkhw", y, rounded(second, dtype)[..., 0, 0]) + y
    # A sum next to a tie may round the other way: one unit of a term of size 3 in 16.
    np.testing.assert_allclose(actual, exact, rtol=0, atol=8 * UNIT[dtype])
