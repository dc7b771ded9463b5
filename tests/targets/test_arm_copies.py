"""Copies, pooling and layers with computed weights for 64-bit ARM, under an emulator."""

from __future__ import annotations

import numpy as np
from tvm import relax

from hone import pipeline
from hone.targets.target import resolve


def test_copies_pooling_and_computed_weights_equal_numpy_when_emulated(
    arm_emulator, tmp_path
) -> None:
    rng = np.random.default_rng(7)
    arrays: list[np.ndarray] = []
    params: list[relax.Var] = []

    def parameter(*shape: int) -> relax.Var:
        arrays.append(rng.standard_normal(shape).astype("float32"))
        params.append(relax.Var(f"p{len(params)}", relax.TensorType(shape, "float32")))
        return params[-1]

    a, b = parameter(1, 5, 7, 13), parameter(1, 5, 7, 13)
    image, weight = parameter(1, 7, 9, 8), parameter(5, 7, 3, 3)
    left, right = parameter(3, 11), parameter(11, 6)
    x, y, i, w, m, n = arrays
    split = (1, 5, 7, 2, 13)
    joined = relax.op.concat([a, b], 3)
    shuffled = relax.op.permute_dims(relax.op.reshape(joined, split), [0, 1, 2, 4, 3])
    results = [
        relax.op.nn.relu(relax.op.concat([a, b], 3)),
        relax.op.reshape(shuffled, (1, 5, 7, 26)),
        relax.op.nn.pad(a, [0, 0, 1, 2, 0, 3, 0, 0]),
        relax.op.nn.avg_pool2d(image, [3, 3], strides=2, padding=0),
        relax.op.nn.conv2d(image, relax.op.nn.relu(weight), padding=0),
        relax.op.matmul(left, right),
    ]
    both = np.concatenate([x, y], 3)
    windows = np.lib.stride_tricks.sliding_window_view(i.astype("float64"), (3, 3), axis=(2, 3))
    wanted = [
        np.maximum(both, 0),
        both.reshape(split).transpose(0, 1, 2, 4, 3).reshape(1, 5, 7, 26),
        np.pad(x, ((0, 0), (1, 2), (0, 3), (0, 0))),
        windows[:, :, ::2, ::2].mean((-2, -1)),
        np.einsum("nchwrs,kcrs->nkhw", windows, np.maximum(w, 0)),
        m.astype("float64") @ n,
    ]
    bb = relax.BlockBuilder()
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(relax.Tuple([bb.emit(bb.normalize(r)) for r in results]))
        bb.emit_func_output(out)
    target = resolve("rpi4")
    scheduled = pipeline.schedule(pipeline.lower(bb.get(), target, threads=2), target, threads=2)
    rules = {decision.rule for decision in scheduled.decisions}
    assert {"copies", "window", "conv2d", "batch_matmul"} <= rules
    library = tmp_path / "lib.so"
    library.write_bytes(pipeline.link(scheduled.module, target, threads=2))
    outputs = arm_emulator.run(library, arrays, cpu="cortex-a72", threads=2)
    for got, want in zip(outputs, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
