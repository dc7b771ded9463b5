"""Kernels that decode their weights for 64-bit ARM, run under an emulator."""

from __future__ import annotations

import numpy as np
from tvm import relax

from hone import pipeline
from hone.passes.quantize.binarize import binarize
from hone.passes.quantize.decode_operator import Decoded
from hone.passes.quantize.weight_schemes import (
    Granularity,
    Scheme,
    WeightOptions,
    quantize_weights,
)
from hone.targets.target import resolve

GROUPS = WeightOptions(
    bits=4, granularity=Granularity.GROUP, group_size=12, symmetric=False, power_of_two=True
)
OPTIONS = [
    WeightOptions(bits=8),
    WeightOptions(bits=4),
    GROUPS,
    WeightOptions(bits=2, granularity=Granularity.TENSOR, symmetric=False),
    WeightOptions(scheme=Scheme.TERNARY),
    WeightOptions(scheme=Scheme.BINARY),
]
RULES = {"weight_only", "conv2d"}


def test_kernels_equal_the_oracle_when_emulated(arm_emulator, tmp_path, rng) -> None:
    rows = rng.standard_normal((1, 37)).astype(np.float32)
    image = rng.standard_normal((1, 6, 5, 7)).astype(np.float32)
    params = [
        relax.Var("rows", relax.TensorType(rows.shape, "float32")),
        relax.Var("image", relax.TensorType(image.shape, "float32")),
    ]
    padded = np.pad(image.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    results, wanted = [], []
    for options in OPTIONS:
        levels = quantize_weights(rng.standard_normal((19, 37)).astype(np.float32), options)
        dense = Decoded(levels=levels, shape=(37, 19), axis=1)
        results.append(relax.op.matmul(params[0], dense.call()))
        wanted.append(rows.astype(np.float64) @ dense.real())
        levels = quantize_weights(rng.standard_normal((5, 63)).astype(np.float32), options)
        conv = Decoded(levels=levels, shape=(5, 3, 3, 7), axis=0)
        results.append(
            relax.op.nn.conv2d(
                params[1], conv.call(), padding=1, data_layout="NHWC", kernel_layout="OHWI"
            )
        )
        wanted.append(np.einsum("nhwcrs,krsc->nhwk", windows, conv.real()))

    binary = Decoded(
        levels=quantize_weights(rng.standard_normal((19, 37)).astype(np.float32), OPTIONS[-1]),
        shape=(37, 19),
        axis=1,
    )
    results.append(relax.op.matmul(binarize(params[0]), binary.call()))
    wanted.append(np.where(rows >= 0, 1.0, -1.0) @ binary.real())

    bb = relax.BlockBuilder()
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(relax.Tuple([bb.emit(result) for result in results]))
        bb.emit_func_output(out)
    target = resolve("rpi4")
    scheduled = pipeline.schedule(pipeline.lower(bb.get(), target, threads=2), target, threads=2)
    assert {decision.rule for decision in scheduled.decisions} == RULES
    assert not [decision.reason for decision in scheduled.decisions if decision.reason]
    library = tmp_path / "lib.so"
    library.write_bytes(pipeline.link(scheduled.module, target, threads=2))
    outputs = arm_emulator.run(library, [rows, image], cpu="cortex-a72", threads=2)
    for got, want in zip(outputs, wanted, strict=True):
        # Sums of at most 63 terms of size about 1, with roundings of 2**-24 each.
        np.testing.assert_allclose(got, want, rtol=0, atol=63 * 2.0**-23 * 10)
