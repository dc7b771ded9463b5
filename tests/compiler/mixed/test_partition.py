"""The cheapest assignment, against trying all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hone.mixed.partition import Border, cheapest, total_us


def chain(length: int, us: float) -> list[Border]:
    return [Border(left=f"n{i}", right=f"n{i + 1}", us=us) for i in range(length - 1)]


def best_by_trying_all(costs, borders, same=str.__eq__) -> float:
    return min(
        total_us(dict(zip(costs, labels, strict=True)), costs, borders, same)
        for labels in itertools.product(*(list(by) for by in costs.values()))
    )


def test_total_is_the_worked_number():
    costs = {f"n{i}": {"fp32": 10.0, "int8": 6.0} for i in range(3)}
    lone = {"n0": "int8", "n1": "fp32", "n2": "int8"}
    assert total_us(lone, costs, chain(3, 3.0), str.__eq__) == 28.0
    assert total_us(dict.fromkeys(costs, "int8"), costs, chain(3, 3.0), str.__eq__) == 18.0


def test_lone_float_layer_stays_in_integers_when_two_conversions_cost_more_than_it_gains():
    costs = {
        "n0": {"fp32": 10.0, "int8": 2.0},
        "n1": {"fp32": 5.0, "int8": 6.0},
        "n2": {"fp32": 10.0, "int8": 2.0},
    }
    assert set(cheapest(costs, chain(3, 1.0)).values()) == {"int8"}


def test_lone_float_layer_goes_back_to_float_when_it_gains_more_than_two_conversions():
    costs = {
        "n0": {"fp32": 10.0, "int8": 2.0},
        "n1": {"fp32": 5.0, "int8": 8.0},
        "n2": {"fp32": 10.0, "int8": 2.0},
    }
    assert cheapest(costs, chain(3, 1.0)) == {"n0": "int8", "n1": "fp32", "n2": "int8"}


def test_island_goes_back_as_a_whole_when_no_layer_of_it_would_alone():
    costs = {"in": {"fp32": 0.0}, "out": {"fp32": 0.0}}
    costs |= {f"n{i}": {"fp32": 10.0, "int8": 9.0} for i in range(3)}
    borders = [
        *chain(3, 2.0),
        Border(left="in", right="n0", us=2.0),
        Border(left="n2", right="out", us=2.0),
    ]
    assert set(cheapest(costs, borders).values()) == {"fp32"}


@pytest.mark.parametrize("seed", range(20))
def test_two_precisions_are_assigned_exactly(seed: int):
    generator = np.random.default_rng(seed)
    costs = {
        f"n{i}": dict(zip(("fp32", "int8"), generator.random(2), strict=True)) for i in range(8)
    }
    borders = [
        Border(left=f"n{a}", right=f"n{b}", us=float(generator.random()) / 2)
        for a, b in itertools.combinations(range(8), 2)
        if generator.random() < 0.4
    ]
    found = total_us(cheapest(costs, borders), costs, borders, str.__eq__)
    assert found == pytest.approx(best_by_trying_all(costs, borders), abs=0.02)


@pytest.mark.parametrize("seed", range(10))
def test_three_precisions_cost_at_most_twice_the_least(seed: int):
    generator = np.random.default_rng(seed)
    labels = ("fp32", "bf16", "int8")
    costs = {f"n{i}": dict(zip(labels, generator.random(3), strict=True)) for i in range(7)}
    found = total_us(cheapest(costs, chain(7, 0.3)), costs, chain(7, 0.3), str.__eq__)
    assert found <= 2 * best_by_trying_all(costs, chain(7, 0.3))


def test_precisions_with_the_same_activations_need_no_conversion():
    costs = {"n0": {"int4 weights": 1.0, "fp32": 2.0}, "n1": {"fp32": 1.0}}
    everything_same = cheapest(costs, chain(2, 50.0), same=lambda _a, _b: True)
    assert everything_same == {"n0": "int4 weights", "n1": "fp32"}
    assert cheapest(costs, chain(2, 50.0)) == {"n0": "fp32", "n1": "fp32"}


def test_precision_that_a_node_does_not_allow_is_never_taken():
    costs = {"n0": {"int8": 1.0, "fp32": 2.0}, "n1": {"fp32": 1.0}, "n2": {"int8": 1.0}}
    found = cheapest(costs, chain(3, 100.0))
    assert found["n1"] == "fp32"
    assert found["n2"] == "int8"


def test_node_without_a_precision_is_an_error():
    with pytest.raises(ValueError, match=r"^no precision is allowed for n1$"):
        cheapest({"n0": {"fp32": 1.0}, "n1": {}}, [])
