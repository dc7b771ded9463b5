"""Compiles one-operator networks through the real pipeline, for the widths that this host runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tvm
from tvm import relax

from hone import pipeline
from hone.passes.apply import apply
from hone.passes.lower.window import Window
from hone.targets.schedule.tile_plan import TilePlan
from hone.targets.target import Target

THREADS = 2


Make = Callable[..., relax.Expr]


@pytest.fixture
def run_op(target: Target) -> Callable[..., tuple[np.ndarray, list[str]]]:
    """Return a function that compiles ``make(*inputs)`` and gives its result and the rules used.

    ``passes`` are applied to the graph first.
    """

    def run(
        make: Make, *arrays: np.ndarray, passes: Sequence[tvm.transform.Pass] = ()
    ) -> tuple[np.ndarray, list[str]]:
        builder = relax.BlockBuilder()
        inputs = [
            relax.Var(f"x{i}", relax.TensorType(a.shape, str(a.dtype)))
            for i, a in enumerate(arrays)
        ]
        with builder.function("main", inputs):
            with builder.dataflow():
                result = builder.emit_output(builder.normalize(make(*inputs)))
            builder.emit_func_output(result)
        module = apply(builder.get(), *passes)
        lowered = pipeline.lower(module, target, threads=THREADS)
        scheduled = pipeline.schedule(lowered, target, threads=THREADS)
        executable = pipeline.build_executable(scheduled.module, target, threads=THREADS)
        machine = relax.VirtualMachine(executable, tvm.cpu())
        output = machine["main"](*[tvm.runtime.tensor(a) for a in arrays]).numpy()
        return output, [decision.rule for decision in scheduled.decisions]

    return run


def _widened(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.uint32) << 16).view(np.float32)


def _tile_sums(data, weight, window: Window, plan: TilePlan) -> np.ndarray:
    """Sum ``[N, H, W, C]`` and ``[K, R, S, C]`` bits of bfloat16 as ``tdpbf16ps`` does.

    float64 holds a product of two 8-bit mantissas and its sum with a float32 of like size exactly:
    rounding that is the one rounding of a fused operation.
    """
    top, left, bottom, right = window.padding
    padded = np.pad(data, ((0, 0), (top, bottom), (left, right), (0, 0)))
    height, width = window.output
    filters, taps_h, taps_w, channels = weight.shape
    run, depth = taps_w * channels, plan.shape.depth
    sums = np.zeros((len(data), height, width, filters), np.float32)
    for r in range(taps_h):
        taps = [
            padded[
                :,
                r * window.dilation[0] :: window.strides[0],
                s * window.dilation[1] :: window.strides[1],
            ][:, :height, :width]
            for s in range(taps_w)
        ]
        runs = np.zeros((*sums.shape[:3], plan.steps * depth), np.uint16)
        runs[..., :run] = np.concatenate(taps, -1)
        rows = np.zeros((filters, plan.steps * depth), np.uint16)
        rows[:, :run] = weight[:, r].reshape(filters, run)
        for first in range(0, plan.steps * depth, depth):
            halves = []
            for odd in (0, 1):
                half = np.zeros_like(sums)
                for at in range(first + odd, first + depth, 2):
                    term = _widened(runs[..., at, None]).astype(np.float64) * _widened(rows[:, at])
                    half = (term + half).astype(np.float32)
                halves.append(half)
            sums = sums + (halves[0] + halves[1])
    return sums


@pytest.fixture
def tile_oracle() -> Callable[[np.ndarray, np.ndarray, Window, TilePlan], np.ndarray]:
    """Return what sums a convolution in tiles of bfloat16, rounding by rounding."""
    return _tile_sums
