"""The assignment of precisions to layers that costs the least time, conversions included.

A layer that is faster in another precision than its neighbours only pays when it gains more than
the conversions at its borders cost, and a neighbourhood may pay where none of its layers does
alone. The sum of both kinds of cost is a pairwise energy. With two precisions its minimum is a
minimum cut, found exactly (Greig, Porteous and Seheult 1989); with more, each round decides by a
minimum cut which layers change to one precision together, until no such change helps
(alpha-expansion; Boykov, Veksler and Zabih, "Fast approximate energy minimization via graph cuts",
PAMI 2001: at most twice the minimum).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

UNITS_PER_US = 1000
"""Capacities are integers: nanoseconds."""

NEVER = 1 << 29
"""Capacity in nanoseconds that no cut pays, half a second; twice that still fits into int32."""


@dataclass(frozen=True, kw_only=True)
class Border:
    """A tensor between two nodes.

    Parameters
    ----------
    left, right : str
        The nodes.
    us : float
        Microseconds that a conversion of it takes.
    """

    left: str
    right: str
    us: float


def total_us(
    assignment: Mapping[str, str],
    costs: Mapping[str, Mapping[str, float]],
    borders: Sequence[Border],
    same: Callable[[str, str], bool],
) -> float:
    """Return the microseconds of an assignment: every node's, and those of its conversions.

    Worked number: three layers of 10 us in float and 6 us in integers, tensors between them that
    take 3 us to convert, the middle layer in float: 6 + 10 + 6 + 2 × 3 = 28 us; all three in
    integers 18 us, in float 30 us.

    Parameters
    ----------
    assignment : mapping of str to str
        Node → precision.
    costs, borders, same
        As for `cheapest`.
    """
    kernels = sum(costs[node][precision] for node, precision in assignment.items())
    return kernels + sum(
        border.us
        for border in borders
        if not same(assignment[border.left], assignment[border.right])
    )


def cheapest(
    costs: Mapping[str, Mapping[str, float]],
    borders: Sequence[Border],
    same: Callable[[str, str], bool] = str.__eq__,
) -> dict[str, str]:
    """Return the precision of every node for which the sum of all costs is least.

    Parameters
    ----------
    costs : mapping of str to mapping of str to float
        Node → precision → microseconds; a precision that is missing is not allowed there.
    borders : sequence of Border
        Tensors between nodes.
    same : callable, optional
        Says whether the activations of two precisions need no conversion.

    Returns
    -------
    dict of str to str
        Node → precision, in the order of the nodes.

    Raises
    ------
    ValueError
        A node allows no precision.
    """
    if empty := [node for node, by_precision in costs.items() if not by_precision]:
        raise ValueError(f"no precision is allowed for {', '.join(empty)}")
    found = {node: min(by, key=lambda label: by[label]) for node, by in costs.items()}
    labels = list(dict.fromkeys(label for by_precision in costs.values() for label in by_precision))
    best = total_us(found, costs, borders, same)
    improved = True
    while improved:
        improved = False
        for label in labels:
            expanded = _expand(found, label, costs, borders, same)
            sum_us = total_us(expanded, costs, borders, same)
            if sum_us < best - 1.0 / UNITS_PER_US:
                found, best, improved = expanded, sum_us, True
    return found


def _expand(
    current: Mapping[str, str],
    label: str,
    costs: Mapping[str, Mapping[str, float]],
    borders: Sequence[Border],
    same: Callable[[str, str], bool],
) -> dict[str, str]:
    """Return the best assignment in which every node keeps its precision or takes one label."""
    number = {node: index for index, node in enumerate(current)}
    source, sink = len(number), len(number) + 1
    # What a node pays for taking the label, less what it pays for staying.
    change = [_units(costs[n].get(label)) - _units(costs[n].get(old)) for n, old in current.items()]
    edges: dict[tuple[int, int], int] = {}
    for border in borders:
        left, right = number[border.left], number[border.right]
        us = _units(border.us)
        old_left, old_right = current[border.left], current[border.right]
        both_stay = us * (not same(old_left, old_right))
        right_takes = us * (not same(old_left, label))
        left_takes = us * (not same(label, old_right))
        # Kolmogorov and Zabih 2004, section 4: a pairwise term as two unary ones and an edge.
        change[left] += left_takes - both_stay
        change[right] -= left_takes
        capacity = right_takes + left_takes - both_stay
        if left != right and capacity:
            edges[left, right] = edges.get((left, right), 0) + capacity
    for node, amount in enumerate(change):
        if amount > 0:
            edges[source, node] = amount
        elif amount < 0:
            edges[node, sink] = -amount
    stay = _source_side(edges, source, sink)
    return {
        node: old if number[node] in stay or label not in costs[node] else label
        for node, old in current.items()
    }


def _units(us: float | None) -> int:
    return NEVER if us is None else min(round(us * UNITS_PER_US), NEVER)


def _source_side(edges: Mapping[tuple[int, int], int], source: int, sink: int) -> set[int]:
    """Return the nodes on the source's side of a minimum cut."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    if not edges:
        return {source}
    tails, heads = np.array(list(edges)).T
    amounts = np.minimum(np.fromiter(edges.values(), np.int64), np.iinfo(np.int32).max)
    size = sink + 1
    graph = csr_array((amounts.astype(np.int32), (tails, heads)), shape=(size, size))
    residual = graph - maximum_flow(graph, source, sink).flow
    residual.eliminate_zeros()
    return set(breadth_first_order(residual, source, return_predecessors=False).tolist())
