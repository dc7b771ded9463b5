"""Kernels are found, told apart from weights and timed in a real run; no time is asserted."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from hone import runtime
from hone.errors import UsageError
from hone.profiling import kernel_timer
from hone.profiling.kernel_timer import Call, Trace


@pytest.fixture(scope="module")
def runner(tiny):
    return runtime.load(tiny.package(), threads=1)


@pytest.fixture(scope="module")
def traced(runner, tiny):
    return kernel_timer.trace(runner, tiny.feeds())


def test_trace_holds_every_kernel_in_order(traced):
    assert [call.name for call in traced.calls if call.is_kernel] == ["scale", "successor"]


def test_trace_knows_the_tensors_of_a_kernel(traced):
    scale = next(call for call in traced.calls if call.name == "scale")
    assert [(o.dtype, o.size_bytes, o.weight) for o in scale.operands] == [
        ("float32", 4 * 24 * 4, False),
        ("float32", 4, False),
        ("float32", 4 * 24 * 4, False),
    ]


def test_trace_counts_the_storage_of_results(traced):
    assert traced.storage_bytes == 4 * 24 * 4 + 3 * 8


def test_weights_are_told_from_activations(dense):
    _, assembled = dense
    runner = runtime.load(assembled.package, threads=1)
    found = kernel_timer.trace(runner, {"x": np.ones((3, 5), np.float32)})
    kernels = [call for call in found.calls if call.is_kernel]
    assert [[o.weight for o in call.operands] for call in kernels] == [
        [False, True, True, False],
        [False, True, True, False],
    ]


def test_times_every_call_of_every_watched_run(runner, tiny, traced):
    rounds = []
    timing = kernel_timer.time_calls(
        runner, tiny.feeds(), traced, seconds=0.0, on_round=rounds.append
    )
    runs = kernel_timer.ROUNDS * kernel_timer.MIN_RUNS
    assert timing.call_s.shape == (runs, len(traced.calls))
    assert (timing.call_s >= 0).all()
    assert timing.run_s.shape == (kernel_timer.ROUNDS,)
    assert timing.watched_rounds.tolist() == np.repeat(np.arange(8), 3).tolist()
    assert timing.timer_s > 0
    assert rounds == list(range(1, kernel_timer.ROUNDS + 1))


def test_runner_is_unwatched_afterwards(runner, tiny):
    seen = []
    with runner.instrumented(lambda *arguments: seen.append(arguments[1])):
        runner.run(tiny.feeds())
    count = len(seen)
    runner.run(tiny.feeds())
    assert count
    assert len(seen) == count


def test_runner_is_unwatched_when_the_block_fails(runner, tiny):
    seen = []

    def fail():
        with runner.instrumented(lambda *_: seen.append(1)):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    runner.run(tiny.feeds())
    assert seen == []


def test_refuses_a_model_that_makes_other_calls(runner, tiny, traced):
    shorter = Trace(calls=(Call(name="scale", operands=()),), storage_bytes=0)
    with pytest.raises(UsageError, match="makes the same calls in every run"):
        kernel_timer.time_calls(runner, tiny.feeds(), shorter, seconds=0.0)


def test_needs_no_compiler(tiny, tmp_path):
    tiny.package().save(tmp_path / "tiny.hone")
    code = (
        "import sys\n"
        "from hone.package import Package\n"
        "from hone.profile import profile_package\n"
        f"found = profile_package(Package.read({str(tmp_path / 'tiny.hone')!r}), seconds=0.0)\n"
        "print([k.name for k in found.kernels], 'tvm' in sys.modules, 'onnx' in sys.modules)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert shown.stdout == "['scale', 'successor'] False False\n"
