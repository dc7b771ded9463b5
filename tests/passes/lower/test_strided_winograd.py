"""3x3 convolutions of stride 2 by their two phases, against a sum over the taps in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from tvm import relax, s_tir, te, tirx

from hone import pipeline
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.graph.to_half import ToHalf
from hone.passes.lower import strided_winograd
from hone.passes.lower.conv2d import pack_conv2d_weight
from hone.passes.lower.strided_winograd import strided_winograd_conv2d
from hone.passes.lower.window import Window
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.strided_winograd import schedule_strided_winograd
from hone.targets.schedule.strided_winograd_model import (
    choose_strided_winograd,
    packed_vectors,
    row_sums,
)
from hone.targets.target import resolve
from hone.weights import weights_bytes

AVX512 = Machine(
    lanes=16, accumulators=28, l1_bytes=48 << 10, l2_bytes=1 << 20, l3_bytes=32 << 20, threads=2
)
RunOp = Callable[..., tuple[np.ndarray, list[str]]]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution: image ``[N, C, H, W]``, filters, padding (top, left, bottom, right)."""

    shape: tuple[int, int, int, int]
    channels: int
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)


LAYERS = {
    "even, shared by rows": Layer(shape=(1, 32, 16, 14), channels=32),
    "odd, shared by channels": Layer(shape=(1, 16, 14, 14), channels=64),
    "a batch of odd rows": Layer(shape=(3, 16, 13, 15), channels=32),
    "padded on two sides": Layer(shape=(1, 48, 17, 18), channels=16, padding=(0, 1, 1, 0)),
    "no padding, prime": Layer(shape=(2, 16, 23, 11), channels=32, padding=(0, 0, 0, 0)),
    "two by two": Layer(shape=(1, 16, 4, 4), channels=48),
    "of 35 columns 17 with a partner": Layer(shape=(1, 16, 5, 70), channels=32),
}
LAYERS_IDS = list(LAYERS)


def convolved(x: np.ndarray, weight: np.ndarray, padding: tuple[int, int, int, int]) -> np.ndarray:
    """Return the convolution of stride 2 in float64."""
    top, left, bottom, right = padding
    padded = np.pad(x.astype("float64"), ((0, 0), (0, 0), (top, bottom), (left, right)))
    height, width = ((extent - 3) // 2 + 1 for extent in padded.shape[2:])
    return sum(
        np.einsum(
            "nchw,kc->nkhw",
            padded[:, :, r : r + 2 * height - 1 : 2, s : s + 2 * width - 1 : 2],
            weight[:, :, r, s],
        )
        for r in range(3)
        for s in range(3)
    )


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS_IDS)
def test_results_are_those_of_the_direct_sum(
    layer: Layer, run_op: RunOp, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strided_winograd, "applies", lambda *_, **__: True)
    x = rng.standard_normal(layer.shape).astype("float32")
    residual_like = rng.standard_normal((1, layer.channels, 1, 1)).astype("float32")
    weight = rng.standard_normal((layer.channels, layer.shape[1], 3, 3)).astype("float32")
    exact = np.maximum(convolved(x, weight, layer.padding) + residual_like, 0)

    def make(v: relax.Var) -> relax.Expr:
        y = relax.op.nn.conv2d(v, relax.const(weight), strides=2, padding=layer.padding)
        return relax.op.nn.relu(relax.op.add(y, relax.const(residual_like)))

    actual, rules = run_op(make, x)
    assert "strided_winograd" in rules
    # Differences of two inputs and sums of four weights: twice the error of a direct sum at most.
    assert np.abs(actual - exact).max() <= 2e-6 * np.abs(exact).max()


def test_a_layer_without_an_epilogue_and_one_with_a_residual_have_the_same_sums(
    run_op: RunOp, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strided_winograd, "applies", lambda *_, **__: True)
    x = rng.standard_normal((1, 16, 12, 12)).astype("float32")
    residual = rng.standard_normal((1, 32, 6, 6)).astype("float32")
    weight = relax.const(rng.standard_normal((32, 16, 3, 3)).astype("float32"))
    plain, rules = run_op(lambda v: relax.op.nn.conv2d(v, weight, strides=2, padding=1), x)
    added, _ = run_op(
        lambda v, r: relax.op.add(relax.op.nn.conv2d(v, weight, strides=2, padding=1), r),
        x,
        residual,
    )
    assert "strided_winograd" in rules
    np.testing.assert_array_equal(added, plain + residual)


def test_error_stays_that_of_a_direct_sum_when_layers_are_deep(
    run_op: RunOp, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Measured 1.1e-6 of the largest output. Of a layer of 128 channels, signs mixed, the phases
    # lose 7e-7 and the direct sum 1.1e-6.
    monkeypatch.setattr(strided_winograd, "applies", lambda *_, **__: True)
    x = np.maximum(rng.standard_normal((1, 256, 14, 14)), 0).astype("float32")
    weight = rng.standard_normal((16, 256, 3, 3)).astype("float32")
    exact = convolved(x, weight, (1, 1, 1, 1))
    actual, _ = run_op(
        lambda v: relax.op.nn.conv2d(v, relax.const(weight), strides=2, padding=1), x
    )
    assert np.abs(actual - exact).max() <= 2e-6 * np.abs(exact).max()


def lowered(
    strides: int,
    *,
    depth: int = 64,
    channels: int = 64,
    weight: np.ndarray | None = None,
    passes: Sequence[tvm.transform.Pass] = (),
    target: str = "x86-64-v4",
    **attrs: object,
) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, depth, 56, 56), "float32"))
    groups = int(attrs.get("groups", 1))  # type: ignore[call-overload]
    values = np.ones((channels, depth // groups, 3, 3), "float32") if weight is None else weight
    with builder.function("main", [x]):
        with builder.dataflow():
            y = relax.op.nn.conv2d(x, relax.const(values), strides=strides, padding=1, **attrs)
            y = builder.emit_output(y)
        builder.emit_func_output(y)
    module = apply(builder.get(), ToNHWC(), *passes) if passes else builder.get()
    return pipeline.lower(module, resolve(target), threads=2)


def kernels(module: tvm.IRModule) -> list[str]:
    return [name.name_hint for name in module.get_global_vars()]


def test_layer_goes_by_phases_and_keeps_its_weights_when_it_is_modelled_faster() -> None:
    module = lowered(2, channels=128)
    assert "strided_winograd_conv2d" in kernels(module)
    assert weights_bytes(module) == 128 * 64 * 9 * 4


@pytest.mark.parametrize(
    "other",
    [
        {"strides": 1},
        {"strides": 3},
        {"strides": 2, "dilation": 2},
        {"strides": 2, "groups": 2},
        {"strides": 2, "depth": 24},
        {"strides": 2, "channels": 24},
    ],
    ids=[
        "stride 1",
        "stride 3",
        "dilated",
        "grouped",
        "depth of no vector",
        "filters of no vector",
    ],
)
def test_layer_stays_direct_when_it_is_another_one(other: dict[str, int]) -> None:
    assert not any("strided" in name for name in kernels(lowered(**other)))


@pytest.mark.parametrize(
    ("height", "width", "channels", "chosen"),
    [
        (28, 28, 128, True),
        (14, 14, 256, True),
        (26, 26, 256, True),
        (7, 7, 512, True),
        # 17 sums of a row share no register tile, one of two rows does not fill it.
        (35, 35, 256, False),
        (28, 35, 256, False),
        (3, 3, 512, False),
        (2, 3, 512, False),
        (56, 56, 256, True),
        # An odd number of rows of tiles for two threads: each would read 31 MB of points again
        # for each tile of channels.
        (70, 70, 256, False),
    ],
)
def test_phases_are_chosen_where_they_were_measured_faster(
    height: int, width: int, channels: int, chosen: bool
) -> None:
    layer = {"height": height, "width": width, "channels": channels, "depth": channels}
    assert choose_strided_winograd(AVX512, batch=1, **layer) is chosen


def test_tuning_may_decide_otherwise() -> None:
    asked: dict[str, tuple[str, ...]] = {}
    machine = Machine(
        lanes=16, accumulators=28, l1_bytes=49152, l2_bytes=1 << 20, threads=2, asked=asked
    )
    window = Window(
        shape=(1, 56, 56, 64), taps=(3, 3), strides=(2, 2), dilation=(1, 1), padding=(1, 1, 1, 1)
    )
    assert strided_winograd.applies(machine, window, channels=128)
    point = "winograd stride 2 1x28x28x64 to 128"
    assert asked == {point: ("phases", "direct")}
    decided = Machine(
        lanes=16,
        accumulators=28,
        l1_bytes=49152,
        l2_bytes=1 << 20,
        threads=2,
        decided=((point, "direct"),),
    )
    assert not strided_winograd.applies(decided, window, channels=128)


def test_odd_rows_leave_out_what_only_a_partner_needs() -> None:
    def products(length: int) -> int:
        return sum(sums * taps for sums, taps in row_sums(length))

    assert [products(length) for length in (1, 2, 7, 28)] == [3, 5, 18, 70]


def test_packing_takes_whole_vectors_only() -> None:
    machine = Machine(lanes=16, accumulators=28, l1_bytes=49152, l2_bytes=1 << 20, threads=2)
    assert [packed_vectors(machine, k) for k in (64, 48, 16, 24)] == [2, 1, 1, 0]


def test_nine_sums_have_the_depths_of_their_taps() -> None:
    # Golden: which sums there are, over what, of which shape, for an odd number of rows.
    window = Window(
        shape=(1, 14, 16, 16), taps=(3, 3), strides=(2, 2), dilation=(1, 1), padding=(1, 1, 1, 1)
    )
    data = te.placeholder((1, 14, 16, 16), "float32", name="data")
    packed = pack_conv2d_weight(np.zeros((32, 3, 3, 16), "float32"), 32)
    weight = te.placeholder(packed.shape, "float32", name="weight")
    result = strided_winograd_conv2d(data, weight, window, channels=32)
    sums = {
        tensor.op.name.removeprefix("swino_acc_"): (
            [int(extent) for extent in tensor.shape[1:3]],
            [int(axis.dom.extent) for axis in tensor.op.reduce_axis],
        )
        for tensor in result.op.input_tensors
    }
    assert sums == {
        "first_first": ([4, 4], [2, 2, 16]),
        "first_second": ([4, 4], [2, 2, 16]),
        "first_shared": ([4, 4], [2, 1, 16]),
        "second_first": ([3, 4], [2, 2, 16]),
        "second_second": ([3, 4], [2, 2, 16]),
        "second_shared": ([3, 4], [2, 1, 16]),
        "shared_first": ([4, 4], [1, 2, 16]),
        "shared_second": ([4, 4], [1, 2, 16]),
        "shared_shared": ([4, 4], [1, 1, 16]),
    }
    assert isinstance(te.create_prim_func([data, weight, result]), tirx.PrimFunc)


def test_register_tiles_of_different_sums_are_points_of_their_own() -> None:
    asked: dict[str, tuple[str, ...]] = {}
    machine = replace(AVX512, asked=asked)
    scheduled_sums(machine, size=14)
    assert {point for point in asked if point.startswith("pixels")} == {
        *("pixels 4x4", "pixels 3x4", "pixels 4x3", "pixels 3x3"),
    }


def scheduled_sums(machine: Machine, *, size: int) -> None:
    """Schedule a layer of an image of so many rows and columns by its phases."""
    window = Window(
        shape=(1, size, size, 16), taps=(3, 3), strides=(2, 2), dilation=(1, 1),
        padding=(1, 1, 1, 1),
    )  # fmt: skip
    data = te.placeholder(window.shape, "float32", name="data")
    weight = te.placeholder((1, 3, 3, 16, 32), "float32", name="weight")
    result = strided_winograd_conv2d(data, weight, window, channels=32)
    module = tvm.IRModule({"main": te.create_prim_func([data, weight, result])})
    schedule_strided_winograd(s_tir.Schedule(module), machine)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_layer_stays_direct_when_weights_are_not_all_finite(
    value: float, strides: int, dtype: str
) -> None:
    weight = np.ones((128, 64, 3, 3), "float32")
    weight[3, 5, 1, 2] = value
    passes = [] if dtype == "float32" else [ToHalf(dtype=dtype)]
    for name in ("x86-64-v4", "sapphirerapids"):
        module = lowered(strides, channels=128, weight=weight, passes=passes, target=name)
        assert not any("winograd" in kernel for kernel in kernels(module))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_layer_stays_direct_when_weights_have_16_bits(dtype: str) -> None:
    for name in ("x86-64-v4", "sapphirerapids"):
        module = lowered(2, channels=128, passes=[ToHalf(dtype=dtype)], target=name)
        assert not any("strided" in kernel for kernel in kernels(module))
