"""Integer kernels for 64-bit ARM, run under an emulator and equal to numpy bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from hone import pipeline
from hone.passes.quantize import operators
from hone.targets.target import resolve

RULES = {
    "rpi4": {"conv2d", "dense"},
    "rpi5": {"dot_conv2d", "dot_dense"},
    # Four channels fill half a group of matrices.
    "graviton3": {"matrices", "dot_conv2d"},
}
# (H, W, C), (K, R, S), stride, padding
CONVS = [
    ((6, 7, 8), (12, 3, 3), 1, 1),
    ((9, 9, 3), (5, 3, 3), 2, 1),
    ((4, 5, 37), (19, 1, 1), 1, 0),
    ((5, 5, 4), (16, 3, 3), 1, 0),
]


def conv_oracle(data, weight, bias, multiplier, levels, stride, padding) -> np.ndarray:
    x = np.pad(
        data.astype(np.int64),
        ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)),
        constant_values=int(levels[0]),
    )
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[1:3], axis=(1, 2))
    acc = np.einsum("nhwcrs,krsc->nhwk", windows[:, ::stride, ::stride], weight.astype(np.int64))
    steps = np.rint((acc + bias).astype(np.float32) * multiplier)
    return np.clip(steps + levels[1], levels[2], levels[3]).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "core"), [("rpi4", "cortex-a72"), ("rpi5", "cortex-a76"), ("graviton3", "max")]
)
def test_integer_kernels_equal_the_oracle_when_emulated(arm_emulator, tmp_path, name, core) -> None:
    rng = np.random.default_rng(11)
    arrays: list[np.ndarray] = []
    results: list[relax.Call] = []
    params: list[relax.Var] = []
    wanted: list[np.ndarray] = []

    def parameter(array: np.ndarray) -> relax.Var:
        arrays.append(array)
        params.append(relax.Var(f"p{len(params)}", relax.TensorType(array.shape, str(array.dtype))))
        return params[-1]

    for shape, filters, stride, padding in CONVS:
        data = rng.integers(0, 256, (1, *shape)).astype(np.uint8)
        weight = rng.integers(-127, 128, (*filters, shape[-1])).astype(np.int8)
        bias = rng.integers(-5000, 5000, filters[0]).astype(np.int32)
        spread = 40 * 127 * np.sqrt(weight[0].size)
        multiplier = (rng.uniform(0.5, 1.5, filters[0]) * 60 / spread).astype(np.float32)
        levels = np.array([int(rng.integers(1, 256)), 131, 7, 250], np.int32)
        results.append(
            operators.conv2d_int8(
                parameter(data),
                relax.const(weight),
                parameter(bias),
                parameter(multiplier),
                parameter(levels),
                strides=(stride, stride),
                padding=(padding,) * 4,
            )
        )
        wanted.append(conv_oracle(data, weight, bias, multiplier, levels, stride, padding))
    data = rng.integers(0, 256, (3, 9)).astype(np.uint8)
    weight = rng.integers(-127, 128, (7, 9)).astype(np.int8)
    bias = rng.integers(-9000, 9000, 7).astype(np.int32)
    multiplier = rng.uniform(0.0005, 0.002, 7).astype(np.float32)
    levels = np.array([3, 119, 5, 250], np.int32)
    results.append(
        operators.dense_int8(
            parameter(data),
            relax.const(weight),
            parameter(bias),
            parameter(multiplier),
            parameter(levels),
        )
    )
    acc = data.astype(np.int64) @ weight.astype(np.int64).T + bias
    steps = np.rint(acc.astype(np.float32) * multiplier)
    wanted.append(np.clip(steps + 119, 5, 250).astype(np.uint8))

    shapes = ((3, 7, 19), (3, 1, 19))
    data, gate = (rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes)
    table = rng.integers(0, 256, 256).astype(np.uint8)
    results.append(operators.table_int8(parameter(data), relax.const(table)))
    wanted.append(table[data])
    factor, levels = np.array([0.011], np.float32), np.array([121, 7, 130, 3, 252], np.int32)
    product = (parameter(data), parameter(gate), parameter(factor), parameter(levels))
    results.append(operators.multiply_int8(*product))
    sums = (data.astype(np.int32) - 121) * (gate.astype(np.int32) - 7)
    steps = np.rint(sums.astype(np.float32) * factor)
    wanted.append(np.clip(steps + 130, 3, 252).astype(np.uint8))

    bb = relax.BlockBuilder()
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(relax.Tuple([bb.emit(result) for result in results]))
        bb.emit_func_output(out)
    target = resolve(name)
    scheduled = pipeline.schedule(pipeline.lower(bb.get(), target, threads=2), target, threads=2)
    assert RULES[name] <= {decision.rule for decision in scheduled.decisions}
    assert not [decision.reason for decision in scheduled.decisions if decision.reason]
    library = tmp_path / "lib.so"
    library.write_bytes(pipeline.link(scheduled.module, target, threads=2))
    outputs = arm_emulator.run(library, arrays, cpu=core, threads=2)
    for got, want in zip(outputs, wanted, strict=True):
        np.testing.assert_array_equal(got, want)
        assert len(np.unique(got)) > 4, "the case must not saturate"
