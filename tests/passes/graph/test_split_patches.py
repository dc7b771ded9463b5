"""SplitPatches: golden, reject and numeric tests, and the forecast that chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import assert_structural_equal

from hone.errors import UsageError
from hone.passes.graph.bands import Bands, cut
from hone.passes.graph.row_windows import Rows, Window
from hone.passes.graph.split_patches import SplitPatches

Body = Callable[[relax.BlockBuilder, relax.Expr], relax.Expr]


def image_module(body: Body, shape: tuple[int, ...] = (1, 3, 19, 7)) -> tvm.IRModule:
    """Return ``main(x) = body(x)`` in one dataflow block."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(body(builder, x))
        builder.emit_func_output(result)
    return builder.get()


def weight(seed: int, *shape: int) -> relax.Constant:
    values = np.random.default_rng(seed).standard_normal(shape)
    return relax.const((values / np.sqrt(np.prod(shape[1:]))).astype("float32"))


def conv(
    builder: relax.BlockBuilder,
    data: relax.Expr,
    name: str,
    *,
    channels: int,
    taps: int = 3,
    groups: int = 1,
    **options: object,
) -> relax.Var:
    depth = int(data.ty.shape[1]) // groups
    kernel = weight(len(name) + channels, channels, depth, taps, taps)
    return builder.emit(relax.op.nn.conv2d(data, kernel, groups=groups, **options), name)


def plain(builder: relax.BlockBuilder, x: relax.Expr) -> relax.Expr:
    value = conv(builder, x, "a", channels=5, padding=1)
    value = builder.emit(relax.op.nn.relu(value), "r")
    return conv(builder, value, "b", channels=4, padding=1)


def strided(builder: relax.BlockBuilder, x: relax.Expr) -> relax.Expr:
    value = conv(builder, x, "a", channels=5, taps=7, strides=2, padding=[3, 3, 2, 2])
    value = builder.emit(
        relax.op.nn.max_pool2d(value, pool_size=(3, 3), strides=(2, 2), padding=(1, 1, 1, 1)), "p"
    )
    return conv(builder, value, "b", channels=4, dilation=2, padding=2)


def residual(builder: relax.BlockBuilder, x: relax.Expr) -> relax.Expr:
    """A residual whose branches need different margins, a depthwise convolution, a bias."""
    first = conv(builder, x, "a", channels=6, padding=1)
    branch = conv(builder, first, "b", channels=6, padding=1, groups=6)
    branch = builder.emit(relax.op.add(branch, weight(9, 1, 6, 1, 1)), "bias")
    branch = conv(builder, branch, "c", channels=6, padding=1)
    value = builder.emit(relax.op.add(branch, first), "sum")
    return builder.emit(relax.op.clip(value, 0, 6), "act")


def averaged(builder: relax.BlockBuilder, x: relax.Expr) -> relax.Expr:
    value = conv(builder, x, "a", channels=5)
    pool = relax.op.nn.avg_pool2d(
        value, pool_size=(3, 3), strides=(2, 2), padding=(1, 1, 1, 1), count_include_pad=False
    )
    value = builder.emit(pool, "p")
    return builder.emit(relax.op.sigmoid(value), "s")


def run(module: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x)).numpy()


@dataclass(frozen=True)
class Case:
    id: str
    body: Body
    layers: tuple[str, ...]
    parts: int


@pytest.mark.parametrize(
    "case",
    [
        Case("two convolutions in two", plain, ("a", "b"), 2),
        Case("two convolutions in as many as there are rows", plain, ("a", "b"), 19),
        Case("one of them", plain, ("b",), 3),
        Case("stride, pool and dilation in three", strided, ("a", "b"), 3),
        Case("stride, pool and dilation row by row", strided, ("a", "p", "b"), 5),
        Case("a residual in four", residual, ("a", "c"), 4),
        Case("inside of a residual is the whole", residual, ("b",), 3),
        Case("average without padding in the count", averaged, ("a", "p"), 4),
    ],
    ids=lambda case: case.id,
)
def test_bands_compute_the_same(case: Case) -> None:
    module = image_module(case.body)
    x = np.random.default_rng(1).standard_normal((1, 3, 19, 7)).astype("float32")
    after = SplitPatches(layers=case.layers, parts=case.parts)(module)
    assert not after["main"].same_as(module["main"])
    # The same sums of the same products; only the order of a vectorized sum could differ.
    np.testing.assert_allclose(run(after, x), run(module, x), rtol=1e-6, atol=1e-6)


def test_bands_are_slices_with_a_margin_and_padding_at_the_border_only() -> None:
    kernel = weight(1, 4, 3, 3, 3)

    def body(builder: relax.BlockBuilder, x: relax.Expr) -> relax.Expr:
        return builder.emit(relax.op.nn.conv2d(x, kernel, padding=1), "c")

    def expected(builder: relax.BlockBuilder, x: relax.Expr) -> relax.Expr:
        top = builder.emit(relax.op.strided_slice(x, axes=[2], begin=[0], end=[4]))
        upper = builder.emit(relax.op.nn.conv2d(top, kernel, padding=[1, 1, 0, 1]))
        low = builder.emit(relax.op.strided_slice(x, axes=[2], begin=[2], end=[5]))
        lower = builder.emit(relax.op.nn.conv2d(low, kernel, padding=[0, 1, 1, 1]))
        return builder.emit(relax.op.concat([upper, lower], axis=2))

    shape = (2, 3, 5, 6)
    after = SplitPatches(layers=["c"], parts=2)(image_module(body, shape))
    assert_structural_equal(relax.transform.Normalize()(after), image_module(expected, shape))
    names = [binding.var.name for binding in after["main"].body.blocks[0].bindings]
    assert names[:4] == ["x@rows0", "c@band0", "x@rows1", "c@band1"]


@dataclass(frozen=True)
class Refused:
    id: str
    body: Body
    text: str
    layers: tuple[str, ...] = ("a",)
    parts: int = 2


def computed_weight(builder: relax.BlockBuilder, x: relax.Expr) -> relax.Expr:
    kernel = builder.emit(relax.op.nn.relu(weight(1, 5, 3, 3, 3)))
    return builder.emit(relax.op.nn.conv2d(x, kernel, padding=1), "a")


def ceiling(builder: relax.BlockBuilder, x: relax.Expr) -> relax.Expr:
    pool = relax.op.nn.max_pool2d(x, pool_size=(2, 2), strides=(2, 2), ceil_mode=True)
    return builder.emit(pool, "a")


def channels_last(builder: relax.BlockBuilder, x: relax.Expr) -> relax.Expr:
    kernel = weight(1, 5, 3, 3, 7)
    call = relax.op.nn.conv2d(x, kernel, padding=1, data_layout="NHWC", kernel_layout="OHWI")
    return builder.emit(call, "a")


def across_rows(builder: relax.BlockBuilder, x: relax.Expr) -> relax.Expr:
    """A sum over the image joins in: bands of it do not exist."""
    value = conv(builder, x, "a", channels=5, padding=1)
    mean = builder.emit(relax.op.mean(value, axis=[2, 3], keepdims=True), "m")
    return builder.emit(relax.op.multiply(value, mean), "w")


def column_factor(builder: relax.BlockBuilder, x: relax.Expr) -> relax.Expr:
    return builder.emit(relax.op.multiply(x, weight(1, 19, 1)), "a")


WITHOUT_REGION = "cannot split into patches: no part of the network with these layers has one image"


@pytest.mark.parametrize(
    "case",
    [
        Refused("weights that are computed", computed_weight, WITHOUT_REGION),
        Refused("a pool that rounds up", ceiling, WITHOUT_REGION),
        Refused("channels last", channels_last, WITHOUT_REGION),
        Refused("a mean beside the image", across_rows, WITHOUT_REGION, ("a", "w")),
        Refused("a factor for each row", column_factor, WITHOUT_REGION),
        Refused(
            "fewer rows than parts",
            plain,
            "cannot split into patches: the result of 'b' has only 19 rows",
            ("a", "b"),
            20,
        ),
        Refused(
            "no such layer",
            plain,
            "cannot split into patches: 'conv' is no layer; 'bb' is no layer, did you mean 'b'?",
            ("conv", "bb"),
        ),
    ],
    ids=lambda case: case.id,
)
def test_what_cannot_be_split_is_refused(case: Refused) -> None:
    with pytest.raises(UsageError) as caught:
        SplitPatches(layers=case.layers, parts=case.parts)(image_module(case.body))
    assert str(caught.value).startswith(case.text)


def test_arguments_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="parts must be at least 2, not 1"):
        SplitPatches(layers=["a"], parts=1)
    with pytest.raises(UsageError, match="needs at least one layer, and parts"):
        SplitPatches(layers=["a"], parts=None)


def large(builder: relax.BlockBuilder, x: relax.Expr) -> relax.Expr:
    """Two large images before a small one, as at the beginning of a network."""
    value = conv(builder, x, "a", channels=16, padding=1)
    value = conv(builder, value, "b", channels=16, padding=1)
    return conv(builder, value, "c", channels=4, strides=2, padding=1)


def test_without_layers_the_split_with_the_least_memory_is_taken() -> None:
    module = image_module(large, (1, 3, 32, 32))
    best = Bands(module["main"]).ranked()[0]
    assert best.peak_bytes < 0.6 * best.whole_bytes
    assert 1 < best.work <= 1.5
    after = SplitPatches(layers=None, parts=None)(module)
    names = [binding.var.name for binding in after["main"].body.blocks[0].bindings]
    assert f"a@band{best.parts - 1}" in names
    assert f"a@band{best.parts}" not in names
    x = np.random.default_rng(1).standard_normal((1, 3, 32, 32)).astype("float32")
    np.testing.assert_allclose(run(after, x), run(module, x), rtol=1e-6, atol=1e-6)


def test_without_layers_nothing_changes_where_no_split_saves_memory() -> None:
    def widening(builder: relax.BlockBuilder, x: relax.Expr) -> relax.Expr:
        return conv(builder, x, "a", channels=64, padding=1)

    module = image_module(widening)
    assert SplitPatches(layers=None, parts=None)(module)["main"].same_as(module["main"])


def test_forecast_counts_what_exists_at_one_time() -> None:
    bands = Bands(image_module(large, (1, 3, 32, 32))["main"])
    (region,) = [r for r in bands.regions() if r.first == 0 and r.last == 2]
    forecast = bands.forecast(region, 2)
    # Whole: both images of 16 channels. Bands: the input, 3 channels and its copied rows are small
    # beside 19 rows of the first image and 17 (of the upper band) of the second one.
    assert forecast.whole_bytes == 2 * 16 * 32 * 32 * 4
    image = 4 * 32
    assert forecast.peak_bytes == pytest.approx(
        (3 * 32 + 4 * 8 / 2 + 16 * (18 + 17)) * image, rel=0.05
    )


def test_windows_read_what_their_output_needs() -> None:
    assert Window(taps=3, stride=2, padding=1).reads(Rows(0, 3)) == Rows(-1, 6)
    assert Window(taps=3, dilation=2, padding=2).reads(Rows(4, 5)) == Rows(2, 7)
    assert Window().reads(Rows(2, 9)) == Rows(2, 9)


@pytest.mark.parametrize(("rows", "parts"), [(7, 2), (7, 7), (8, 3), (19, 4)])
def test_bands_cover_every_row_once_and_are_nearly_equal(rows: int, parts: int) -> None:
    bands = cut(rows, parts)
    assert [row for band in bands for row in range(band.first, band.end)] == list(range(rows))
    assert max(map(len, bands)) - min(map(len, bands)) <= 1
