"""1x1 convolutions by products of sums of two operands, against a sum over channels in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from tvm import relax, te, tirx

from hone import pipeline
from hone.passes.lower import conv2d, dense, legalize
from hone.passes.lower.pairs import pack, pairs_product
from hone.targets import adder_intrinsics
from hone.targets.adder_intrinsics import sum_by_product
from hone.targets.schedule import pairs
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.pairs import pixel_tiles
from hone.targets.target import Target

ZEN5 = Machine(
    lanes=16,
    accumulators=28,
    l1_bytes=48 << 10,
    l2_bytes=1 << 20,
    l3_bytes=32 << 20,
    threads=2,
    separate_adders=True,
)
RunOp = Callable[..., tuple[np.ndarray, list[str]]]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A 1x1 convolution: image ``[N, H, W, C]`` and filters."""

    shape: tuple[int, int, int, int]
    channels: int


LAYERS = {
    "threads share rows": Layer(shape=(1, 14, 14, 32), channels=64),
    "an odd number of rows": Layer(shape=(1, 7, 7, 48), channels=32),
    "threads share channels": Layer(shape=(1, 5, 7, 34), channels=320),
    "rows in one tile": Layer(shape=(1, 6, 3, 40), channels=64),
    "a batch, half a prime": Layer(shape=(3, 2, 8, 38), channels=32),
    "one task": Layer(shape=(1, 1, 6, 32), channels=32),
}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every machine take pairs: what is added on which unit is no matter of numerics."""
    for module in (conv2d, dense):
        monkeypatch.setattr(module, "pairs_apply", lambda *_, **__: True)

    class Everything:
        def __contains__(self, _weight: object) -> bool:
            return True

    monkeypatch.setattr(legalize, "known_scale", lambda _: Everything())


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("layer", LAYERS.values(), ids=list(LAYERS))
def test_results_are_those_of_the_direct_sum(
    layer: Layer, run_op: RunOp, rng: np.random.Generator
) -> None:
    depth = layer.shape[3]
    x = np.maximum(rng.standard_normal(layer.shape), -0.5).astype("float32")
    weight = rng.standard_normal((layer.channels, 1, 1, depth)) / np.sqrt(depth)
    # Channels of different size, one of them of zeros.
    weight *= np.exp2(rng.integers(-6, 3, (layer.channels, 1, 1, 1)))
    weight[1] = 0
    weight = weight.astype("float32")
    bias = rng.standard_normal((1, 1, 1, layer.channels)).astype("float32")
    residual = rng.standard_normal((*layer.shape[:3], layer.channels)).astype("float32")

    def make(x: relax.Expr, residual: relax.Expr) -> relax.Expr:
        y = relax.op.nn.conv2d(x, relax.const(weight), data_layout="NHWC", kernel_layout="OHWI")
        y = relax.op.add(relax.op.add(y, relax.const(bias)), residual)
        return relax.op.nn.relu(y)

    result, rules = run_op(make, x, residual)
    assert "pairs" in rules
    exact = x.astype("float64") @ weight[:, 0, 0, :].T.astype("float64")
    expected = np.maximum(exact + bias + residual, 0)
    # Each of `depth` additions rounds sums that are up to four times as large: of two operands of
    # root mean square 1 each, whose products are scaled back by the channel's factor.
    spread = np.sqrt(np.square(weight).mean((1, 2, 3)))
    bound = 4 * depth * np.finfo("float32").eps * (1 + spread)
    assert (np.abs(result - expected) <= bound).all()


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix product: the left side's shape, and columns."""

    shape: tuple[int, ...]
    channels: int


MATRICES = {
    "a matrix": Matrix(shape=(24, 32), channels=64),
    "a batch of one": Matrix(shape=(1, 64, 96), channels=320),
    "a batch": Matrix(shape=(3, 10, 44), channels=32),
    "two leading axes": Matrix(shape=(2, 3, 16, 38), channels=32),
    "threads share columns": Matrix(shape=(8, 64), channels=512),
}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=list(MATRICES))
def test_matrix_products_are_those_of_numpy(
    matrix: Matrix, run_op: RunOp, rng: np.random.Generator
) -> None:
    depth = matrix.shape[-1]
    x = rng.standard_normal(matrix.shape).astype("float32")
    weight = (rng.standard_normal((depth, matrix.channels)) / np.sqrt(depth)).astype("float32")
    bias = rng.standard_normal(matrix.channels).astype("float32")

    def make(x: relax.Expr) -> relax.Expr:
        y = relax.op.matmul(x, relax.const(weight))
        return relax.op.nn.relu(relax.op.add(y, relax.const(bias)))

    result, rules = run_op(make, x)
    assert rules == ["pairs"]
    expected = np.maximum(x.astype("float64") @ weight.astype("float64") + bias, 0)
    np.testing.assert_allclose(result, expected, atol=4 * depth * np.finfo("float32").eps)


def test_error_is_a_few_times_that_of_the_direct_sum(rng: np.random.Generator) -> None:
    x = np.maximum(rng.standard_normal((98, 576)), 0).astype("float32")
    weight = (rng.standard_normal((64, 576)) / 24).astype("float32")
    packed, behind = pack(weight, 16)
    half = 288
    sides = packed.transpose(0, 3, 2, 1).reshape(64, 2, half)
    sums = np.zeros((98, 64), "float32")
    own = np.zeros(98, "float32")
    direct = np.zeros((98, 64), "float32")
    for j in range(half):
        first, second = x[:, j, None], x[:, half + j, None]
        sums += (first + sides[None, :, 0, j]) * (second + sides[None, :, 1, j])
        own += first[:, 0] * second[:, 0]
        direct += first * weight[None, :, j] + second * weight[None, :, half + j]
    result = (sums - own[:, None]) * behind[0] + behind[1]
    exact = x.astype("float64") @ weight.T.astype("float64")
    error, plain = (np.abs(y - exact).max() / np.abs(exact).max() for y in (result, direct))
    assert error < 8 * plain
    assert error < 1e-5


def test_pack_scales_each_channel_by_a_power_of_two() -> None:
    weight = np.full((32, 4), 0.125, "float32")
    weight[1:] = [[3, -3, 3, -3]]
    packed, behind = pack(weight, 16)
    assert packed.shape == (1, 2, 2, 32)
    # Of pairs (0, 2) and (1, 3) the second one's weight comes first.
    np.testing.assert_array_equal(packed[0, :, :, 0], [[1, 1], [1, 1]])
    np.testing.assert_array_equal(packed[0, :, :, 1], [[0.75, 0.75], [-0.75, -0.75]])
    np.testing.assert_array_equal(behind[0, :2], [0.125, 4])
    np.testing.assert_array_equal(behind[1, :2], [-0.125 * 2, -4 * 2 * 0.75**2])


REJECTED = {
    "no units that only add": (replace(ZEN5, separate_adders=False), {}),
    "vectors of 8 lanes": (replace(ZEN5, lanes=8), {}),
    "an odd number of input channels": (ZEN5, {"depth": 65}),
    "few input channels": (ZEN5, {"depth": 16}),
    "channels that two vectors do not divide": (ZEN5, {"channels": 48}),
    "13 columns": (ZEN5, {"width": 13}),
    "a tile of weights that takes a quarter of L2": (ZEN5, {"depth": 2048}),
    "tuning found otherwise": (
        replace(ZEN5, decided=(("pairs 14x14x64 to 128", "direct"),)),
        {},
    ),
}


@pytest.mark.parametrize(("machine", "change"), REJECTED.values(), ids=list(REJECTED))
def test_layers_stay_direct_when(machine: Machine, change: dict[str, int]) -> None:
    layer = {"height": 14, "width": 14, "channels": 128, "depth": 64}
    assert pairs.applies(ZEN5, **layer)
    assert not pairs.applies(machine, **{**layer, **change})


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("special", [np.inf, np.nan])
def test_weights_that_are_not_finite_stay_direct(
    special: float, run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((1, 7, 7, 32)).astype("float32")
    weight = rng.standard_normal((32, 1, 1, 32)).astype("float32")
    weight[0, 0] = special

    def make(x: relax.Expr) -> relax.Expr:
        return relax.op.nn.conv2d(x, relax.const(weight), data_layout="NHWC", kernel_layout="OHWI")

    _, rules = run_op(make, x)
    assert "pairs" not in rules


def test_register_tiles_take_whole_rows_where_they_take_several() -> None:
    assert pixel_tiles(14, 14) == [(1, 7)]
    assert pixel_tiles(56, 56) == [(1, 8), (1, 7)]
    assert pixel_tiles(4, 3) == [(2, 3)]
    assert pixel_tiles(13, 13) == []


def test_kernel_has_seven_sums_by_product_for_a_tile_of_seven_pixels(target: Target) -> None:
    if target.vector_bits != 512:
        pytest.skip(f"{target.name} has no vectors of 16 lanes")
    data = te.placeholder((1, 7, 7, 64), name="data")
    weight, behind = (te.placeholder(s, name="w") for s in ((1, 32, 2, 32), (2, 32)))
    result = pairs_product(data, weight, behind, lanes=16)
    func = te.create_prim_func([data, weight, behind, result]).with_attr("global_symbol", "main")
    scheduled = pipeline.schedule(tvm.IRModule({"main": func}), target, threads=2)
    assert [d.rule for d in scheduled.decisions] == ["pairs"]
    built = tvm.compile(scheduled.module, target.tvm_target(2), tir_pipeline=pipeline.TIR_PIPELINE)
    assembly = built.mod.inspect_source("asm")
    assert assembly.count("{rn-sae}") == 7


@pytest.mark.parametrize("lanes", [1, 8, 16])
def test_sum_by_product_is_the_sum(lanes: int, rng: np.random.Generator, target: Target) -> None:
    left, right = (te.placeholder((48,), name=name) for name in "ab")
    total = te.compute((48,), lambda i: sum_by_product(left[i], right[i]), name="total")
    schedule = tvm.s_tir.Schedule(te.create_prim_func([left, right, total]))
    block = schedule.get_sblock("total")
    if lanes > 1:
        (loop,) = schedule.get_loops(block)
        schedule.vectorize(schedule.split(loop, [None, lanes])[1])
    if lanes == 16 and target.vector_bits != 512:
        pytest.skip(f"{target.name} has no vectors of 16 lanes")
    built = tvm.compile(schedule.mod, target.tvm_target(1), tir_pipeline=pipeline.TIR_PIPELINE)
    a, b = (rng.standard_normal(48).astype("float32") for _ in range(2))
    out = tvm.runtime.tensor(np.zeros(48, "float32"))
    built(tvm.runtime.tensor(a), tvm.runtime.tensor(b), out)
    np.testing.assert_array_equal(out.numpy(), a + b)


def test_only_vectors_of_16_lanes_need_a_definition() -> None:
    value = tirx.Var("value", "float32")
    assert adder_intrinsics.definitions([sum_by_product(value, value)]) == ""
