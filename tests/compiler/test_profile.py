"""A profile put together from times that are given, and one real run of each way in."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from hone import profile
from hone.errors import UsageError
from hone.packaging.manifest import CostEntry
from hone.profiling import kernel_timer, roofline, roofline_bench
from hone.profiling.kernel_timer import Call, Operand, Timing, Trace
from hone.profiling.roofline import Bound, Level, Peak, Roofline

LIMITS = Roofline(
    threads=1,
    peaks={"float32": Peak(instruction="fma", operations_per_second=1e9)},
    levels=(Level(name="memory", capacity_bytes=None, footprint_bytes=1, bytes_per_second=1e9),),
    quiet=True,
)


def tensor(size: int, address: int, *, weight: bool = False) -> Operand:
    return Operand(dtype="float32", size_bytes=size, address=address, weight=weight)


def call(name: str, *operands: Operand) -> Call:
    return Call(name=name, operands=operands)


TRACE = Trace(
    calls=(
        call("vm.builtin.alloc_storage"),
        call("conv", tensor(400, 1), tensor(800, 2, weight=True), tensor(400, 3)),
        call("table", tensor(4000, 4, weight=True), tensor(40, 5), tensor(40, 6)),
        call("conv", tensor(400, 3), tensor(800, 7, weight=True), tensor(400, 1)),
    ),
    storage_bytes=1234,
)


class Runner:
    """Stands for a loaded package."""

    threads = 1

    def __init__(self, costs: dict[str, CostEntry]) -> None:
        self.manifest = SimpleNamespace(kernels={"conv": ("a", "b")}, costs=costs)


@pytest.fixture
def timed(monkeypatch):
    """Profile with these times in microseconds: two rounds of two runs."""

    def timed(calls_us, runs_us, costs=None, roofline=None):
        timing = Timing(
            call_s=np.array(calls_us, float) * 1e-6,
            run_s=np.array(runs_us, float) * 1e-6,
            watched_rounds=np.array([0, 0, 1, 1]),
            timer_s=2e-7,
        )
        monkeypatch.setattr(profile, "trace", lambda *_: TRACE)
        monkeypatch.setattr(profile, "time_calls", lambda *_, **__: timing)
        runner = Runner(costs or {})
        return profile.profile(runner, {}, roofline=roofline)  # type: ignore[arg-type]

    return timed


STEADY = [[1, 2, 1, 4]] * 4
COSTS = {
    "conv": CostEntry(
        operations=600.0, touched_bytes=(400, 800, 400), dtype="float32", rule="conv2d"
    ),
    "table": CostEntry(operations=0.0, touched_bytes=(80, 40, 40), converts=("quantize x",)),
}


def test_calls_of_one_kernel_are_summed(timed):
    found = timed(STEADY, [10, 10])
    conv, table = found.kernels
    assert (conv.name, conv.calls, conv.time_ms) == ("conv", 2, pytest.approx(6e-3))
    assert (table.name, table.calls, table.time_ms) == ("table", 1, pytest.approx(1e-3))
    assert conv.layers == ("a", "b")
    assert table.layers == ()


def test_rest_of_the_run_is_the_overhead(timed):
    found = timed(STEADY, [10, 12])
    assert found.run_ms == pytest.approx(11e-3)
    assert found.overhead_ms == pytest.approx(4e-3)
    assert found.overhead_ci95_ms == (pytest.approx(3e-3), pytest.approx(5e-3))
    assert found.overhead_known
    shares = [kernel.share for kernel in found.kernels]
    assert shares == [pytest.approx(6 / 11), pytest.approx(1 / 11)]


def test_overhead_below_zero_is_noise_and_takes_no_share(timed):
    found = timed(STEADY, [6, 6])
    assert found.overhead_ms == pytest.approx(-1e-3)
    assert not found.overhead_known
    assert sum(kernel.share for kernel in found.kernels) == pytest.approx(1)


def test_bytes_are_those_of_all_calls_and_weights_count_once(timed):
    conv, table = timed(STEADY, [10, 10]).kernels
    assert (conv.moved_bytes, conv.weights_bytes) == (3200, 1600)
    assert (table.moved_bytes, table.weights_bytes) == (4080, 4000)


def test_gather_moves_only_what_it_touches(timed):
    table = timed(STEADY, [10, 10], costs=COSTS).kernels[1]
    assert (table.moved_bytes, table.weights_bytes) == (160, 4000)


def test_rates_follow_from_operations_and_time(timed):
    conv, table = timed(STEADY, [10, 10], costs=COSTS, roofline=LIMITS).kernels
    assert conv.operations == 1200
    assert conv.gflops == pytest.approx(1200 / 6e-6 / 1e9)
    # 1600 bytes at 1 GB/s take longer than 600 operations at 1 GFLOP/s, twice
    assert conv.floor_ms == pytest.approx(3.2e-3)
    assert conv.roofline == pytest.approx(3.2 / 6)
    assert (conv.bound, conv.peak) == (Bound.MEMORY, "float32")
    assert (conv.rule, conv.converts) == ("conv2d", ())
    assert (table.rule, table.converts) == (None, ("quantize x",))
    assert table.gflops == 0


def test_kernel_is_held_against_the_peak_of_what_it_works_on(timed):
    fast = Peak(instruction="dot", operations_per_second=1e12)
    limits = LIMITS.model_copy(update={"peaks": {**LIMITS.peaks, "bfloat16": fast}})
    pairs = {"conv": CostEntry(operations=6e6, touched_bytes=(1, 1, 1), dtype="bfloat16")}
    conv = timed(STEADY, [10, 10], costs=pairs, roofline=limits).kernels[0]
    assert (conv.dtype, conv.peak, conv.bound) == ("bfloat16", "bfloat16", Bound.COMPUTE)
    assert conv.floor_ms == pytest.approx(2 * 6e-3)


def test_nothing_is_made_up_without_costs(timed):
    conv = timed(STEADY, [10, 10], roofline=LIMITS).kernels[0]
    assert (conv.operations, conv.gflops, conv.floor_ms, conv.roofline, conv.bound, conv.peak) == (
        None, None, None, None, None, None,
    )  # fmt: skip


def test_kernel_that_takes_no_time_has_no_rate(timed):
    conv = timed([[0, 0, 0, 0]] * 4, [1, 1], costs=COSTS, roofline=LIMITS).kernels[0]
    assert (conv.gflops, conv.roofline) == (None, None)


@pytest.fixture
def limits(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(roofline_bench, "measure", lambda *_, **__: LIMITS)


@pytest.mark.usefixtures("limits")
def test_model_is_profiled_with_everything_known(dense):
    model, _ = dense
    found = profile.profile_model(model, threads=1, seconds=0.0)
    (kernel,) = found.kernels
    assert kernel.calls == 2
    assert kernel.layers == ("first", "first_relu", "second", "second_relu")
    assert kernel.operations == 2 * 15 * (2 * 5 + 2)
    assert kernel.rule is not None
    assert found.roofline == LIMITS
    assert found.runs == kernel_timer.ROUNDS * kernel_timer.MIN_RUNS


@pytest.mark.usefixtures("limits")
def test_package_says_of_its_kernels_what_a_model_does(dense, tmp_path):
    from hone import driver

    model, assembled = dense
    package = assembled.package.with_evidence(
        golden=driver.golden_samples(model, driver.runtime.load(assembled.package)), recipe={}
    )
    package.save(tmp_path / "dense.hone")
    (kernel,) = profile.profile_package(package.read(tmp_path / "dense.hone"), seconds=0.0).kernels
    assert kernel.operations == 2 * 15 * (2 * 5 + 2)
    assert (kernel.rule, kernel.peak, kernel.dtype) == ("dense", "float32", "float32")
    assert kernel.roofline is not None


def test_package_of_an_older_hone_is_profiled_without_its_operations(tiny):
    found = profile.profile_package(tiny.package(), seconds=0.0)
    scale, successor = found.kernels
    assert (scale.layers, successor.layers) == (("conv_1", "relu_1"), ())
    assert (scale.rule, scale.operations, found.roofline) == (None, None, None)
    assert found.threads == 1


def test_package_without_golden_inputs_is_refused(tiny):
    with pytest.raises(UsageError, match="holds no golden inputs"):
        profile.profile_package(tiny.package(thread_ids=True), seconds=0.0)


def test_cache_of_the_machine_is_used(dense, limits):
    from hone.targets.target import resolve

    roofline.write(roofline.cache_path(resolve("host"), 1), LIMITS)
    model, _ = dense
    assert profile.profile_model(model, threads=1, seconds=0.0).roofline == LIMITS
