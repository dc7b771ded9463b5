"""Compiles one-operator networks through the real pipeline, for the widths that this host runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tvm
from tvm import relax

from hone import pipeline
from hone.driver import runs_here
from hone.passes.apply import apply
from hone.targets.target import Target, resolve

THREADS = 2


@pytest.fixture(params=["host", "x86-64-v3"])
def target(request: pytest.FixtureRequest) -> Target:
    resolved = resolve(request.param)
    if not runs_here(resolved):
        pytest.skip(f"this machine cannot run code for {request.param}")
    return resolved


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
