"""Kernels of 16-bit floats for 64-bit ARM, run under an emulator, against numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tvm import relax

from hone import pipeline
from hone.passes.apply import apply
from hone.passes.graph.to_half import ToHalf
from hone.targets.target import resolve

TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# (H, W, C), (K, R, S), stride, padding; the third is large enough for Winograd's F(2x2).
CONVS = [
    ((6, 7, 8), (12, 3, 3), 2, 1),
    ((9, 9, 3), (5, 3, 3), 2, 1),
    ((8, 8, 32), (32, 3, 3), 1, 1),
    ((4, 5, 37), (19, 1, 1), 1, 0),
]


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize(
    ("name", "core"), [("rpi4", "cortex-a72"), ("rpi5", "cortex-a76"), ("graviton3", "max")]
)
def test_half_kernels_equal_the_oracle_when_emulated(
    arm_emulator, tmp_path, name, core, dtype
) -> None:
    rng = np.random.default_rng(5)
    arrays: list[np.ndarray] = []
    params: list[relax.Var] = []
    results: list[relax.Expr] = []
    wanted: list[np.ndarray] = []

    def parameter(*shape: int) -> relax.Expr:
        arrays.append(rng.standard_normal(shape).astype("float32"))
        params.append(relax.Var(f"p{len(params)}", relax.TensorType(shape, "float32")))
        return relax.op.nn.relu(params[-1])

    def operand(array: np.ndarray) -> np.ndarray:
        return array.astype(TYPES[dtype]).astype("float64")

    for shape, filters, stride, padding in CONVS:
        weight = (rng.standard_normal((*filters, shape[-1])) / 8).astype("float32")
        data = parameter(1, *shape)
        results.append(
            relax.op.nn.conv2d(
                data, relax.const(weight), strides=stride, padding=padding,
                data_layout="NHWC", kernel_layout="OHWI",
            )
        )  # fmt: skip
        x = operand(np.maximum(arrays[-1], 0))
        x = np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, filters[1:], axis=(1, 2))
        windows = windows[:, ::stride, ::stride]
        wanted.append(np.einsum("nhwcrs,krsc->nhwk", windows, operand(weight)))
    weight = rng.standard_normal((18, 7)).astype("float32")
    results.append(relax.op.matmul(parameter(5, 18), relax.const(weight)))
    wanted.append(operand(np.maximum(arrays[-1], 0)) @ operand(weight))
    left, right = parameter(2, 5, 8), parameter(2, 8, 9)
    results.append(relax.op.matmul(left, right))
    a, b = (operand(np.maximum(array, 0)) for array in arrays[-2:])
    wanted.append(a @ b)

    bb = relax.BlockBuilder()
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(relax.Tuple([bb.emit(result) for result in results]))
        bb.emit_func_output(out)
    target = resolve(name)
    module = apply(bb.get(), ToHalf(dtype=dtype))
    scheduled = pipeline.schedule(pipeline.lower(module, target, threads=2), target, threads=2)
    rules = {decision.rule for decision in scheduled.decisions}
    assert {"conv2d", "dense", "batch_matmul"} <= rules
    assert not [decision.reason for decision in scheduled.decisions if decision.reason]
    library = tmp_path / "lib.so"
    library.write_bytes(pipeline.link(scheduled.module, target, threads=2))
    outputs = arm_emulator.run(library, arrays, cpu=core, threads=2)
    # Winograd rounds its points once more: in bfloat16 2**-9 of sums of a few hundred terms of
    # magnitude 1/8, in float16 an eighth of it; everywhere else sums of float32 differ.
    coarse = {"bfloat16": 0.1, "float16": 0.0125}[dtype]
    for position, (got, want) in enumerate(zip(outputs, wanted, strict=True)):
        tolerance = coarse if position == 2 and "winograd" in rules else 1e-4
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=tolerance)
