"""Sums of bfloat16 in tiles equal those that the manual's text gives, rounding by rounding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import te, tirx

from hone.passes.lower import tile_sums
from hone.passes.lower.promote_accumulators import CODEGEN_CONFIG, TIR_PIPELINE
from hone.passes.lower.window import Window
from hone.targets.features import missing
from hone.targets.schedule.cpu import schedule_function
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.tile_plan import ranked_plans
from hone.targets.target import Target, resolve
from hone.targets.tile_product import TileProduct

PRODUCT = TileProduct.TDPBF16PS


@pytest.fixture(scope="module")
def target() -> Target:
    base = resolve("x86-64-v3")
    if lacking := missing(base.features, base.arch):
        pytest.skip(f"this machine lacks {', '.join(lacking)}")
    return replace(base, features=tuple(sorted({*base.features, "amx-bf16", "amx-tile"})))


def bits(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize(
    ("shape", "filters", "strides", "padding"),
    [
        ((1, 6, 5, 24), (20, 3, 3), (1, 1), (1, 1, 1, 1)),
        ((2, 7, 5, 6), (33, 3, 2), (2, 1), (0, 1, 1, 0)),
        ((1, 5, 5, 40), (16, 1, 1), (2, 2), (0, 0, 0, 0)),
    ],
    ids=["padded", "strided", "pointwise"],
)
def test_sums_of_bfloat16_equal_the_oracle(
    amx, tile_oracle, target, shape, filters, strides, padding
) -> None:
    rng = np.random.default_rng(3)
    window = Window(
        shape=shape, taps=filters[1:], strides=strides, dilation=(1, 1), padding=padding
    )
    work = tile_sums.conv2d_work(window, filters[0], PRODUCT)
    plan = ranked_plans(work, target.l1d_bytes)[0]
    data = bits(rng.normal(size=shape))
    weight = bits(rng.normal(size=(*filters, shape[3])))
    packed = tile_sums.pack_tiles(weight.reshape(filters[0], filters[1], -1), plan)
    image = te.placeholder(shape, "uint16", name="image")
    matrix = te.placeholder(packed.shape, "uint16", name="matrix")
    source = tile_sums.copy_rows(image, window, plan, tirx.const(0, "uint16"))
    total = tile_sums.sums(source, matrix, plan, window)
    height, width = window.output
    out = te.compute(
        (shape[0], height, width, filters[0]),
        lambda n, h, w, k: total[n, h * width + w, k],
        name="result",
    )
    func, decision = schedule_function(
        te.create_prim_func([image, matrix, out]), Machine.of(target, 2), kernel="main"
    )
    assert (decision.rule, decision.reason) == ("tiles", "")
    with tvm.transform.PassContext(opt_level=3, config=CODEGEN_CONFIG):
        library = tvm.tirx.build(func, target=target.tvm_target(2), pipeline=TIR_PIPELINE)
    assert "tdpbf16ps" in library.inspect_source("asm")
    got = tvm.runtime.tensor(np.zeros((shape[0], height, width, filters[0]), np.float32))
    library["main"](tvm.runtime.tensor(data), tvm.runtime.tensor(packed), got)
    np.testing.assert_array_equal(got.numpy(), tile_oracle(data, weight, window, plan))
