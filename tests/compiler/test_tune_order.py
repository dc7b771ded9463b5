from __future__ import annotations

import pytest

from hone.tuning.order import Order, estimate_s


def turns(order: Order, count: int) -> list[int]:
    taken = []
    for _ in range(count):
        kernel = order.next()
        assert kernel is not None
        taken.append(kernel)
        order.turned(kernel, progress=True)
    return taken


def test_first_round_visits_every_kernel_the_largest_share_first() -> None:
    order = Order([1e-3, 5e-3, 2e-3], calls=[1, 1, 4])
    assert turns(order, 3) == [2, 1, 0]


def test_turns_follow_the_shares_when_all_make_progress() -> None:
    order = Order([3e-3, 1e-3], calls=[1, 1])
    assert turns(order, 12).count(0) == 9


def test_measured_times_replace_the_estimates() -> None:
    order = Order([1e-3, 1e-3], calls=[1, 1])
    assert order.timed(1, 9e-3)
    assert turns(order, 2) == [1, 0]
    assert order.next() == 1


def test_a_kernel_waits_longer_when_its_batches_bring_nothing() -> None:
    order = Order([4e-3, 1e-3], calls=[1, 1])
    turns(order, 2)
    assert order.next() == 0
    for _ in range(3):
        order.turned(0, progress=False)
    assert order.next() == 1


def test_equal_kernels_take_turns_in_their_order() -> None:
    assert turns(Order([1e-3] * 3, calls=[1] * 3), 6) == [0, 1, 2, 0, 1, 2]


def test_next_is_none_when_all_kernels_are_finished() -> None:
    order = Order([1e-3, 2e-3], calls=[1, 1])
    order.finish(1)
    assert order.next() == 0
    order.finish(0)
    assert order.next() is None


@pytest.mark.parametrize(("seconds", "better"), [(0.98e-3, True), (0.995e-3, False), (2e-3, False)])
def test_timed_calls_it_progress_only_beyond_noise(seconds: float, better: bool) -> None:
    order = Order([1.0], calls=[1])
    order.timed(0, 1e-3)
    assert order.timed(0, seconds) is better


def test_estimate_adds_compute_and_memory_time() -> None:
    assert estimate_s(2e10, 1e10) == pytest.approx(2.0)


def test_kernels_without_a_share_of_the_model_wait_when_the_shares_are_known() -> None:
    order = Order([1.0, 1.0, 1.0], calls=[1, 1, 1], model_s=[0.001, 8.9, 3.0])
    assert turns(order, 8) == [1, 2, 1, 1, 2, 1, 1, 1]


def test_a_share_of_the_model_shrinks_as_a_kernel_becomes_faster() -> None:
    order = Order([1.0, 1.0], calls=[1, 5], model_s=[4.0, 3.0])
    order.timed(0, 10.0)
    order.timed(1, 1.0)
    assert turns(order, 2) == [0, 1]
    assert order.next() == 0
    order.timed(0, 5.0)
    assert order.next() == 1
