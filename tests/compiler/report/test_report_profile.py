from __future__ import annotations

import pytest

from hone.profiling.roofline import Level, Peak, Roofline
from hone.report import profile
from hone.report.schema import LayerRow, Totals

KERNEL = LayerRow(
    kernel="fused_conv2d_relu",
    layers=["conv1", "relu1", "conv2"],
    calls=2,
    latency_ms=0.4213,
    share=0.0512,
    weights_bytes=20_000,
    dtype="int8",
    rule="conv2d",
    operations=1.2e8,
    gflops=284.8,
    moved_bytes=220_000,
    roofline=0.423,
    bound="compute",
    peak="int8",
)


def found(**changes: object) -> Totals:
    facts = {
        "run_ms": 1.0,
        "overhead_ms": 0.05,
        "overhead_ci95_ms": (0.04, 0.06),
        "timer_ms": 0.0002,
        "runs": 100,
        "storage_bytes": 4096,
    }
    return Totals.model_validate(facts | changes)


def test_cells_fill_every_column():
    assert dict(zip(profile.COLUMNS, profile.cells(KERNEL), strict=True)) == {
        "kernel": "fused_conv2d_relu",
        "layers": "conv1 relu1 and 1 more",
        "rule": "conv2d",
        "type": "int8",
        "calls": "2",
        "ms": "0.421",
        "share": "5.1%",
        "GFLOP/s": "285",
        "moved": "220 kB",
        "roofline": "42%",
        "bound": "int8 compute",
    }


def test_unknown_figures_are_dashes():
    cells = profile.cells(LayerRow(kernel="k", layers=[]))
    assert cells == ("k", "-", "-", "-", "1", *["-"] * 6)


def test_conversions_stand_before_layers():
    row = LayerRow(kernel="k", layers=["pool"], converts=["quantize pool"])
    assert profile.cells(row)[1] == "quantize pool pool"


def test_memory_bound_names_no_peak():
    assert profile.bound(KERNEL.model_copy(update={"bound": "memory"})) == "memory"


def test_overhead_is_a_figure_when_it_stands_out_of_noise():
    assert profile.overhead(found()) == "0.0500 ms (0.0400 to 0.0600), 5.0% of a run"


def test_overhead_is_no_figure_when_it_is_noise():
    text = profile.overhead(found(overhead_ci95_ms=(-0.01, 0.06)))
    assert text == "lost in noise (95%: -0.01 to 0.06 ms)"


def test_slowest_kernel_comes_first():
    rows = [
        LayerRow(kernel=str(time), layers=[], latency_ms=time) for time in (0.1, 0.3, None, 0.2)
    ]
    assert [row.kernel for row in profile.by_time(rows)] == ["0.3", "0.2", "0.1", "None"]


@pytest.mark.parametrize(("dtype", "unit"), [("float32", "GFLOP/s"), ("int8", "GOP/s")])
def test_limits_name_unit_instruction_and_levels(dtype, unit):
    limits = Roofline(
        threads=2,
        peaks={dtype: Peak(instruction="512-bit thing", operations_per_second=5.4e11)},
        levels=(
            Level(name="L2", capacity_bytes=1, footprint_bytes=1, bytes_per_second=3e11),
            Level(name="memory", capacity_bytes=None, footprint_bytes=1, bytes_per_second=2e10),
        ),
        quiet=True,
    )
    assert profile.limits(limits) == (
        f"{dtype} 540 {unit} (512-bit thing)",
        "L2 300 GB/s, memory 20 GB/s",
    )
