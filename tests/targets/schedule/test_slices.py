from __future__ import annotations

from dataclasses import replace

import pytest

from hone.targets.schedule.machine import Machine
from hone.targets.schedule.slices import LayerLoad, choose_slice, point

MACHINE = Machine(
    lanes=16,
    accumulators=28,
    l1_bytes=48 << 10,
    l2_bytes=1 << 20,
    l3_bytes=32 << 20,
    threads=2,
)


def layers(
    *, activation_bytes: int, weight_bytes: int, products: int = 10**6, count: int = 8
) -> list[LayerLoad]:
    load = LayerLoad(
        products=products, activation_bytes=activation_bytes, weight_bytes=weight_bytes
    )
    return [load] * count


def test_a_thread_takes_one_sample_when_its_tensors_fill_l2_and_weights_are_few() -> None:
    loads = layers(activation_bytes=900_000, weight_bytes=10_000)
    assert choose_slice(MACHINE, batch=32, layers=loads) == 1


def test_a_thread_takes_several_samples_when_all_weights_come_from_memory() -> None:
    loads = layers(activation_bytes=200_000, weight_bytes=10 << 20, products=10**9)
    assert choose_slice(MACHINE, batch=32, layers=loads) > 1


def test_all_threads_share_every_kernel_when_weights_are_most_of_the_work() -> None:
    loads = layers(activation_bytes=10_000, weight_bytes=10 << 20)
    assert choose_slice(MACHINE, batch=2, layers=loads) == 0


def test_all_threads_share_every_kernel_when_one_of_them_would_be_idle() -> None:
    loads = layers(activation_bytes=10_000, weight_bytes=10_000, products=10**8)
    assert choose_slice(MACHINE, batch=3, layers=loads) == 0
    assert choose_slice(MACHINE, batch=4, layers=loads) > 0


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_there_are_no_slices_when_there_are_fewer_samples_than_threads(batch: int) -> None:
    loads = layers(activation_bytes=900_000, weight_bytes=10_000)
    machine = replace(MACHINE, threads=4)
    assert choose_slice(machine, batch=batch, layers=loads) == 0


def test_a_measured_choice_is_taken_and_one_that_is_no_divisor_is_not() -> None:
    loads = layers(activation_bytes=900_000, weight_bytes=10_000)
    for option, images in (("whole", 0), ("4", 4), ("5", 1)):
        machine = replace(MACHINE, decided=((point(32, loads), option),))
        assert choose_slice(machine, batch=32, layers=loads) == images


def test_the_choices_are_told_the_best_first() -> None:
    loads = layers(activation_bytes=900_000, weight_bytes=10_000)
    asked: dict[str, tuple[str, ...]] = {}
    choose_slice(replace(MACHINE, asked=asked), batch=8, layers=loads)
    ((name, options),) = asked.items()
    assert name == point(8, loads)
    assert options[0] == "1"
    assert sorted(options) == ["1", "2", "4", "whole"]


def test_the_point_names_the_batch_and_the_network() -> None:
    one, other = (layers(activation_bytes=size, weight_bytes=1) for size in (1, 2))
    assert point(8, one).startswith("slices of 8, ")
    assert len({point(8, one), point(8, other), point(4, one)}) == 3
