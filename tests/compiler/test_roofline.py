"""The limits of a machine: which one counts, and how they are kept."""

from __future__ import annotations

import dataclasses

import pytest

from hone.profiling import roofline, roofline_bench
from hone.profiling.roofline import Bound, Level, Peak, Roofline
from hone.targets.target import resolve

KIB = 1024


def machine(*, scale: float = 1.0, quiet: bool = True, dot: bool = True) -> Roofline:
    """100 Gop/s (int8: 400), 400 GB/s up to 64 KiB, 10 GB/s beyond."""
    peaks = {"float32": Peak(instruction="fma", operations_per_second=100e9 * scale)}
    if dot:
        peaks["int8"] = Peak(instruction="dot", operations_per_second=400e9)
    rates = (("L1", 64 * KIB, 400e9), ("memory", None, 10e9))
    levels = tuple(
        Level(name=name, capacity_bytes=size, footprint_bytes=32 * KIB, bytes_per_second=rate)
        for name, size, rate in rates
    )
    return Roofline(threads=2, peaks=peaks, levels=levels, quiet=quiet)


def floor(**changes):
    facts = {
        "dtype": "float32",
        "operations": 1e6,
        "weight_bytes": 0,
        "activation_bytes": 0,
        "model_bytes": KIB,
    }
    return machine().floor_s(**(facts | changes))


def test_operations_bound_a_kernel_that_moves_little():
    assert floor(activation_bytes=KIB) == (pytest.approx(1e-5), Bound.COMPUTE)


def test_bytes_of_int8_are_held_against_the_dot_product():
    assert floor(dtype="uint8") == (pytest.approx(2.5e-6), Bound.COMPUTE)
    assert machine().peak("int8")[0] == "int8"


def test_int8_is_held_against_float32_where_there_is_no_dot_product():
    assert machine(dot=False).peak("int8") == ("float32", machine().peaks["float32"])


def test_weights_come_from_where_the_whole_model_is():
    seconds, bound = floor(weight_bytes=40_000, model_bytes=10**9)
    assert (seconds, bound) == (pytest.approx(1e-5), Bound.COMPUTE)
    assert floor(weight_bytes=400_000, model_bytes=10**9) == (pytest.approx(4e-5), Bound.MEMORY)
    assert floor(weight_bytes=40_000, model_bytes=40_000, operations=0)[0] == pytest.approx(1e-7)


def test_activations_come_from_where_they_fit():
    in_cache, _ = floor(operations=0, activation_bytes=64 * KIB, model_bytes=10**9)
    in_memory, _ = floor(operations=0, activation_bytes=64 * KIB + 1, model_bytes=10**9)
    assert in_cache == pytest.approx(64 * KIB / 400e9)
    assert in_memory == pytest.approx((64 * KIB + 1) / 10e9)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return roofline.cache_path(resolve("host"), 2)


@pytest.fixture
def measured(monkeypatch):
    """What the next measurements give, first to last, and how many were made."""
    answers: list[Roofline] = []
    monkeypatch.setattr(roofline_bench, "measure", lambda target, threads: answers.pop(0))
    return answers


def test_quiet_measurement_is_made_once(cache, measured):
    measured.append(machine())
    first = roofline.of_this_machine(resolve("host"), threads=2)
    assert first == (machine(), None)
    assert cache.exists()
    assert roofline.of_this_machine(resolve("host"), threads=2) == first


def test_disturbed_measurement_is_repeated_and_the_higher_limit_kept(cache, measured):
    measured += [machine(scale=2, quiet=False), machine(scale=1, quiet=True)]
    roofline.of_this_machine(resolve("host"), threads=2)
    second, _ = roofline.of_this_machine(resolve("host"), threads=2)
    assert second == machine(scale=2, quiet=True)
    assert roofline.of_this_machine(resolve("host"), threads=2)[0] == second


@pytest.mark.parametrize("content", ["", "{}", '{"threads": 2, "unknown": 1}'])
def test_unreadable_cache_is_measured_again(cache, measured, content):
    cache.parent.mkdir()
    cache.write_text(content)
    measured.append(machine())
    assert roofline.of_this_machine(resolve("host"), threads=2) == (machine(), None)
    assert roofline.read(cache) == machine()


def test_says_so_when_the_cache_cannot_be_written(tmp_path, monkeypatch, measured):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    measured.append(machine())
    found, problem = roofline.of_this_machine(resolve("host"), threads=2)
    assert found == machine()
    assert problem is not None
    assert problem.startswith("the limits of this machine cannot be kept in")


def test_cache_is_per_threads_and_target(cache):
    host = resolve("host")
    assert roofline.cache_path(host, 1) != cache
    assert roofline.cache_path(dataclasses.replace(host, vector_bits=128), 2) != cache


def test_capacities_grow_and_end_in_memory():
    target = dataclasses.replace(
        resolve("rpi4"), l1d_bytes=32 * KIB, l2_bytes=1024 * KIB, l3_bytes=0
    )
    found = roofline_bench.capacities(target, 4)
    assert [(name, size) for name, size, _ in found] == [
        ("L1", 128 * KIB), ("L2", 4096 * KIB), ("memory", None),
    ]  # fmt: skip
    assert [footprint for _, _, footprint in found[:2]] == [64 * KIB, 2048 * KIB]
    assert found[-1][2] >= 8192 * KIB


def test_cache_that_is_not_larger_is_left_out():
    target = dataclasses.replace(resolve("rpi4"), l1d_bytes=32 * KIB, l2_bytes=32 * KIB, l3_bytes=0)
    assert [name for name, *_ in roofline_bench.capacities(target, 1)] == ["L1", "memory"]


def test_dot_product_is_the_widest_that_a_target_has():
    dots = {name: roofline_bench.byte_dot(resolve(name)) for name in ("x86-64-v3", "rpi4")}
    assert dots == {"x86-64-v3": None, "rpi4": None}
    wide = dataclasses.replace(resolve("x86-64-v4"), features=("avx512vnni",))
    found = roofline_bench.byte_dot(wide)
    assert found is not None
    assert found.lanes == 16
    narrow = dataclasses.replace(resolve("x86-64-v3"), features=("avxvnni",))
    found = roofline_bench.byte_dot(narrow)
    assert found is not None
    assert found.lanes == 8


def test_measures_this_machine(target, monkeypatch):
    small = {"STEPS_PER_CALL": 1 << 8, "BYTES_PER_CALL": 1 << 16, "CALLS": 2}
    for constant, value in small.items():
        monkeypatch.setattr(roofline_bench, constant, value)
    monkeypatch.setattr(
        roofline_bench,
        "capacities",
        lambda *_: [("L1", 4096, 2048), ("memory", None, 1 << 16)],
    )
    found = roofline_bench.measure(target, threads=2)
    assert found.threads == 2
    assert "float32" in found.peaks
    assert [level.name for level in found.levels] == ["L1", "memory"]
    assert Roofline.model_validate_json(found.model_dump_json()) == found
