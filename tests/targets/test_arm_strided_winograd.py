"""3x3 convolutions of stride 2 by their two phases for 64-bit ARM, run under an emulator."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from hone import pipeline
from hone.passes.lower import strided_winograd
from hone.targets.target import resolve

# (H, W, C) of the input, output channels: even rows that threads share, odd ones, 17 partners.
LAYERS = [((12, 12, 8), 24), ((9, 14, 16), 8), ((5, 70, 4), 8)]


@pytest.mark.parametrize(("name", "core"), [("rpi4", "cortex-a72"), ("graviton3", "max")])
def test_phases_equal_the_direct_sum_when_emulated(
    arm_emulator, tmp_path, name: str, core: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strided_winograd, "applies", lambda *_, **__: True)
    target = resolve(name)
    rng = np.random.default_rng(7)
    arrays: list[np.ndarray] = []
    params: list[relax.Var] = []
    results: list[relax.Expr] = []
    wanted: list[np.ndarray] = []
    for (height, width, depth), channels in LAYERS:
        shape = (1, height, width, 4 * depth)
        weight = rng.standard_normal((4 * channels, 3, 3, 4 * depth)).astype("float32")
        arrays.append(rng.standard_normal(shape).astype("float32"))
        params.append(relax.Var(f"p{len(params)}", relax.TensorType(shape, "float32")))
        results.append(
            relax.op.nn.conv2d(
                params[-1], relax.const(weight), strides=2, padding=1,
                data_layout="NHWC", kernel_layout="OHWI",
            )
        )  # fmt: skip
        x = np.pad(arrays[-1].astype("float64"), ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2]
        wanted.append(np.einsum("nhwcrs,krsc->nhwk", windows, weight, optimize=True))
    bb = relax.BlockBuilder()
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(relax.Tuple([bb.emit(result) for result in results]))
        bb.emit_func_output(out)
    scheduled = pipeline.schedule(pipeline.lower(bb.get(), target, threads=2), target, threads=2)
    assert [decision.rule for decision in scheduled.decisions] == ["strided_winograd"] * len(LAYERS)
    library = tmp_path / "lib.so"
    library.write_bytes(pipeline.link(scheduled.module, target, threads=2))
    outputs = arm_emulator.run(library, arrays, cpu=core, threads=2)
    for got, want in zip(outputs, wanted, strict=True):
        assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()
