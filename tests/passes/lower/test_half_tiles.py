"""Layers of bfloat16 in AMX tiles: equal to an oracle that rounds where the instruction does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import relax

from hone import pipeline
from hone.passes.apply import apply
from hone.passes.graph.to_half import ToHalf
from hone.passes.lower import tile_sums
from hone.passes.lower.half_tiles import PRODUCT
from hone.passes.lower.window import Window
from hone.targets.half_dot import HalfDot, half_dot_of
from hone.targets.schedule.tile_plan import TilePlan, TileWork, ranked_plans
from hone.targets.target import Target, resolve

Oracle = Callable[[np.ndarray, np.ndarray, Window, TilePlan], np.ndarray]
THREADS = 2


@pytest.fixture(scope="module")
def target() -> Target:
    host = resolve("host")
    if half_dot_of(host) not in (HalfDot.VDPBF16PS, HalfDot.TDPBF16PS):
        pytest.skip("this machine has no AVX512-BF16, which layers too small for tiles use")
    return replace(host, features=tuple(sorted({*host.features, "amx-bf16", "amx-tile"})))


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.astype(ml_dtypes.bfloat16)).view("uint16")


@dataclass(frozen=True)
class Ran:
    """What a network returned, and what it is made of."""

    got: np.ndarray
    rules: list[str]
    assembly: str


def run(
    make: Callable[..., relax.Expr],
    arrays: list[np.ndarray],
    target: Target,
    decided: dict[str, str] | None = None,
) -> Ran:
    """Compile a network in bfloat16 whose inputs are parameters, and run it."""
    params = [
        relax.Var(f"x{i}", relax.TensorType(a.shape, str(a.dtype))) for i, a in enumerate(arrays)
    ]
    bb = relax.BlockBuilder()
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(bb.normalize(make(*params)))
        bb.emit_func_output(out)
    module = apply(bb.get(), ToHalf())
    lowered = pipeline.lower(module, target, threads=THREADS, decided=decided)
    scheduled = pipeline.schedule(lowered, target, threads=THREADS)
    assert not [d.reason for d in scheduled.decisions if d.reason]
    executable = pipeline.build_executable(scheduled.module, target, threads=THREADS)
    (library,) = (m for m in executable.mod.imports if m.kind == "llvm")
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]
    got = main(*[tvm.runtime.tensor(a) for a in arrays]).numpy()
    return Ran(got, [d.rule for d in scheduled.decisions], library.inspect_source("asm"))


def words(assembly: str) -> set[str]:
    return {line.split()[0] for line in assembly.splitlines() if line.startswith("\t")}


@dataclass(frozen=True, kw_only=True)
class Conv:
    id: str
    shape: tuple[int, int, int, int]
    filters: tuple[int, int, int]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    inner: bool = True

    @property
    def window(self) -> Window:
        return Window(
            shape=self.shape,
            taps=self.filters[1:],
            strides=self.strides,
            dilation=self.dilation,
            padding=self.padding,
        )

    @property
    def work(self) -> TileWork:
        return tile_sums.conv2d_work(self.window, self.filters[0], PRODUCT)


CONVS = [
    Conv(id="plain", shape=(1, 9, 8, 32), filters=(48, 3, 3), padding=(1,) * 4),
    Conv(id="primes", shape=(1, 13, 11, 7), filters=(5, 3, 3), padding=(1,) * 4),
    Conv(id="batch of three", shape=(3, 5, 7, 20), filters=(33, 3, 3), padding=(1,) * 4),
    Conv(id="strided", shape=(1, 9, 7, 24), filters=(40, 3, 3), strides=(2, 2), padding=(1,) * 4),
    Conv(id="stride 3 and 2", shape=(2, 11, 9, 8), filters=(7, 4, 2), strides=(3, 2)),
    Conv(id="dilated", shape=(1, 13, 9, 12), filters=(9, 3, 2), dilation=(2, 3), padding=(2,) * 4),
    Conv(id="one pixel", shape=(1, 1, 1, 3), filters=(5, 3, 3), padding=(1,) * 4),
    Conv(id="an input", shape=(1, 15, 13, 3), filters=(17, 7, 7), strides=(2, 2), padding=(3,) * 4,
         inner=False),
    Conv(id="pointwise", shape=(1, 8, 8, 96), filters=(24, 1, 1)),
    Conv(id="pointwise batch", shape=(3, 4, 4, 64), filters=(72, 1, 1)),
    Conv(id="pointwise prime", shape=(1, 7, 7, 37), filters=(19, 1, 1)),
    Conv(id="pointwise strided", shape=(1, 7, 9, 32), filters=(16, 1, 1), strides=(2, 2)),
    Conv(id="pointwise padded", shape=(1, 5, 5, 16), filters=(16, 1, 1), padding=(1, 0, 0, 1)),
]  # fmt: skip


def check_conv(case: Conv, plan: TilePlan, target: Target, oracle: Oracle) -> Ran:
    """Run convolution, bias, residual and activation with a plan; the result is bfloat16's."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal(case.shape).astype("float32")
    weight = rng.standard_normal((*case.filters, case.shape[3])).astype("float32")
    bias = rng.standard_normal(case.filters[0]).astype("float32")
    data = np.maximum(x, 0) if case.inner else x
    sums = oracle(bits(data), bits(weight), case.window, plan)
    other = rng.standard_normal(sums.shape).astype("float32")

    def make(x: relax.Expr, other: relax.Expr) -> relax.Expr:
        y = relax.op.nn.conv2d(
            relax.op.nn.relu(x) if case.inner else x, relax.const(weight), strides=case.strides,
            padding=case.padding, dilation=case.dilation, data_layout="NHWC",
            kernel_layout="OHWI",
        )  # fmt: skip
        y = relax.op.add(relax.op.add(y, relax.const(bias)), other)
        y = relax.op.astype(relax.op.nn.relu(y), "bfloat16")
        return relax.op.astype(y, "float32")

    ran = run(make, [x, other], target, {case.work.name: plan.name})
    assert "tiles" in ran.rules
    want = np.maximum(sums + bias + other, 0).astype(ml_dtypes.bfloat16).astype("float32")
    np.testing.assert_array_equal(ran.got, want)
    return ran


@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.id)
def test_conv2d_in_tiles_equals_the_oracle(amx, case: Conv, target, tile_oracle) -> None:
    before = amx.counts()
    plan = ranked_plans(case.work, target.l1d_bytes)[0]
    ran = check_conv(case, plan, target, tile_oracle)
    assert {"ldtilecfg", "tdpbf16ps", "tilestored", "tilerelease"} <= words(ran.assembly)
    if before is not None:
        assert amx.counts()["tdpbf16ps"] > before["tdpbf16ps"]


EVERY_PLAN = [
    (case, plan)
    for case in CONVS
    if case.id in ("batch of three", "pointwise batch")
    for plan in ranked_plans(case.work, 48 << 10)
]


@pytest.mark.parametrize(
    ("case", "plan"), EVERY_PLAN, ids=[f"{case.id}-{plan.name}" for case, plan in EVERY_PLAN]
)
def test_every_plan_equals_the_oracle(amx, case: Conv, plan, target, tile_oracle) -> None:
    check_conv(case, plan, target, tile_oracle)


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((2, 64), 100), ((3, 7), 5), ((31, 12), 33), ((32, 128), 64), ((2, 3, 6), 16),
     ((2, 8, 40), 17), ((1, 32, 64), 48), ((4, 1, 64), 32)],
    ids=str,
)  # fmt: skip
def test_dense_in_tiles_equals_the_oracle(
    amx, target, tile_oracle: Oracle, shape: tuple[int, ...], channels: int
) -> None:
    rng = np.random.default_rng(8)
    rows, depth = math.prod(shape[:-1]), shape[-1]
    x = rng.standard_normal(shape).astype("float32")
    weight = rng.standard_normal((depth, channels)).astype("float32")
    bias = rng.standard_normal(channels).astype("float32")
    work = tile_sums.dense_work(rows, depth, channels, PRODUCT)
    plan = ranked_plans(work, target.l1d_bytes)[0]

    def make(x: relax.Expr) -> relax.Expr:
        y = relax.op.matmul(relax.op.nn.relu(x), relax.const(weight))
        return relax.op.nn.relu(relax.op.add(y, relax.const(bias)))

    ran = run(make, [x], target, {work.name: plan.name})
    assert "tiles" in ran.rules
    assert "tdpbf16ps" in words(ran.assembly)
    matrix = bits(np.maximum(x, 0)).reshape(1, 1, rows, depth)
    window = Window(
        shape=matrix.shape, taps=(1, 1), strides=(1, 1), dilation=(1, 1), padding=(0,) * 4
    )
    sums = tile_oracle(matrix, bits(weight.T)[:, None, None], window, plan)
    want = np.maximum(sums.reshape(*shape[:-1], channels) + bias, 0)
    np.testing.assert_array_equal(ran.got, want)


def rules_of(case: Conv, target: Target, decided: dict[str, str] | None = None) -> list[str]:
    """Return the rules of one convolution that reads what another kernel stores."""
    x = relax.Var("x", relax.TensorType(case.shape, "float32"))
    weight = np.zeros((*case.filters, case.shape[3]), "float32")
    bb = relax.BlockBuilder()
    with bb.function("main", [x]):
        with bb.dataflow():
            y = relax.op.nn.conv2d(
                relax.op.nn.relu(x), relax.const(weight), strides=case.strides,
                padding=case.padding, data_layout="NHWC", kernel_layout="OHWI",
            )  # fmt: skip
            out = bb.emit_output(bb.normalize(y))
        bb.emit_func_output(out)
    module = apply(bb.get(), ToHalf())
    lowered = pipeline.lower(module, target, threads=THREADS, decided=decided)
    return [d.rule for d in pipeline.schedule(lowered, target, threads=THREADS).decisions]


def layer(size: int, channels: int, taps: int = 3, stride: int = 1) -> Conv:
    return Conv(
        id="",
        shape=(1, size, size, channels),
        filters=(channels, taps, taps),
        strides=(stride, stride),
        padding=(taps // 2,) * 4,
    )


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        (layer(56, 64), "tiles"),
        (layer(7, 512), "tiles"),
        (layer(28, 128, stride=2), "tiles"),
        (layer(14, 256, taps=1), "tiles"),
        (layer(6, 4), "conv2d"),
        (layer(1, 64, taps=1), "conv2d"),
    ],
)
def test_tiles_are_chosen_where_they_are_modelled_faster(case: Conv, rule: str) -> None:
    assert rule in rules_of(case, resolve("sapphirerapids"))


def test_tuning_may_take_vectors_instead() -> None:
    case = layer(28, 128)
    rules = rules_of(case, resolve("sapphirerapids"), {case.work.name: "vectors"})
    assert "winograd" in rules
    assert "tiles" not in rules


@pytest.mark.parametrize("feature", ["amx-tile", "amx-bf16"])
def test_tiles_are_left_out_when_the_target_leaves_them_out(feature: str) -> None:
    target = resolve(f"sapphirerapids,-{feature}")
    assert half_dot_of(resolve("sapphirerapids")) == HalfDot.TDPBF16PS
    assert half_dot_of(target) == HalfDot.VDPBF16PS
    assert "tiles" not in rules_of(layer(14, 256, taps=1), target)
    assert "winograd" in rules_of(layer(28, 128), target)
