"""The model of tiles: its plans fit the registers, cover the layer, and cost what its text says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tvm import relax, s_tir

from hone.passes.apply import apply
from hone.passes.lower.tile_sums import conv2d_work, dense_work
from hone.passes.lower.window import Window
from hone.passes.quantize import operators
from hone.passes.quantize.legalize import rules
from hone.targets.half_dot import HalfDot
from hone.targets.integer_dot import IntegerDot
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.tile_plan import TileWork, ranked_plans, tiles_pay, vector_cycles
from hone.targets.schedule.tiles import register_intrinsics
from hone.targets.target import resolve
from hone.targets.tile_product import FORMS, TILES, TileProduct

L1_BYTES = 48 << 10


def layer(
    size: int,
    channels: int,
    filters: int,
    taps: int,
    stride: int = 1,
    product: TileProduct = TileProduct.TDPBUSD,
) -> TileWork:
    window = Window(
        shape=(1, size, size, channels),
        taps=(taps, taps),
        strides=(stride, stride),
        dilation=(1, 1),
        padding=(taps // 2,) * 4,
    )
    return conv2d_work(window, filters, product)


def test_worked_number_is_what_the_model_says() -> None:
    work = layer(56, 64, 64, 3)
    plan = ranked_plans(work, L1_BYTES)[0]
    assert plan.name == "16x16 2x2"
    assert (plan.steps, plan.pitch) == (3, 192)
    assert plan.cycles == 98 * 2 * (9 * 64 + 64 + 52) + 58 * 56 * 192 / 16 == 174_608
    assert vector_cycles(work, IntegerDot.VPDPBUSD, 16) == 903_168


def test_bfloat16_takes_twice_the_steps_and_loads_that_bind_them() -> None:
    work = layer(56, 64, 64, 3, product=TileProduct.TDPBF16PS)
    plan = ranked_plans(work, L1_BYTES)[0]
    assert plan.name == "16x16 2x2"
    assert (plan.steps, plan.pitch) == (6, 192)
    # 36 KiB of weights for a block are more than half of L1: four loads from L2 take 84 cycles.
    assert plan.cycles == 98 * 2 * (18 * 84 + 64 + 52) + 58 * 56 * 384 / 16 == 397_040
    assert vector_cycles(work, HalfDot.VDPBF16PS, 16) == 1_806_336


@pytest.mark.parametrize("product", TileProduct)
def test_every_plan_fits_the_tiles_and_covers_the_layer(product: TileProduct) -> None:
    group = FORMS[product].group
    for rows, depth, filters in itertools.product((1, 7, 16, 49, 197), (1, 5, 64, 960), (1, 40)):
        for plan in ranked_plans(dense_work(rows, depth, filters, product), L1_BYTES):
            shape = plan.shape
            assert 2 <= shape.rows <= 16
            assert 2 <= shape.groups <= 16
            used = shape.left_tiles * shape.right_tiles + shape.left_tiles + shape.right_tiles
            assert used <= TILES
            assert shape.left_tiles + shape.right_tiles <= 4
            assert plan.steps * shape.depth >= depth
            assert plan.pitch >= plan.steps * shape.depth
            if plan.in_place:
                assert rows % shape.block_rows == 0
                assert plan.steps * shape.depth == plan.pitch == depth
                assert depth % group == 0


@pytest.mark.parametrize(
    ("work", "pays"),
    [
        (layer(56, 64, 64, 3), True),
        (layer(7, 512, 512, 3), True),
        (layer(28, 128, 256, 1, stride=2), True),
        (layer(14, 576, 96, 1), True),
        (layer(112, 16, 96, 1), False),
        (layer(224, 3, 32, 3, stride=2), False),
        (dense_work(1, 2048, 1000, TileProduct.TDPBUSD), False),
    ],
)
def test_tiles_are_for_layers_with_work(work: TileWork, pays: bool) -> None:
    vectors = vector_cycles(work, IntegerDot.VPDPBUSD, 16)
    assert tiles_pay(ranked_plans(work, L1_BYTES)[0], vectors) == pays


def test_rows_that_share_sets_of_the_cache_are_spread() -> None:
    work = dense_work(49, 1024, 512, TileProduct.TDPBUSD)
    copied = next(plan for plan in ranked_plans(work, L1_BYTES) if not plan.in_place)
    assert copied.pitch == 1024 + 64


def test_intrinsics_of_a_record_are_registered_before_it_is_replayed() -> None:
    target = resolve("sapphirerapids")
    types = [((11, 140), "uint8"), ((48,), "int32"), ((48,), "float32"), ((4,), "int32")]
    data, bias, multiplier, levels = (
        relax.Var(f"p{i}", relax.TensorType(*type)) for i, type in enumerate(types)
    )
    weight = relax.const(np.ones((48, 140), np.int8))
    bb = relax.BlockBuilder()
    with bb.function("main", [data, bias, multiplier, levels]):
        with bb.dataflow():
            call = operators.dense_int8(data, weight, bias, multiplier, levels)
            out = bb.emit_output(call)
        bb.emit_func_output(out)
    module = apply(bb.get(), relax.transform.LegalizeOps(rules(Machine.of(target, 2))))
    work = dense_work(11, 140, 48, TileProduct.TDPBUSD)
    shape = ranked_plans(work, target.l1d_bytes)[0].shape
    name = f"hone_tdpbusd_multiply_{shape.rows}x{shape.groups}"
    assert s_tir.TensorIntrin.get(name, allow_missing=True) is None
    (kernel,) = (f for v, f in module.functions.items() if v.name_hint != "main")
    register_intrinsics(type(module)({"main": kernel}))
    assert s_tir.TensorIntrin.get(name, allow_missing=True) is not None
