"""What a survey of a network finds: the chains of bindings that become integer operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from tvm import relax

from hone.passes.graph.dataflow import layer_of


class Kind(StrEnum):
    """What a site computes."""

    CONV2D = "conv2d"
    CONV2D_TRANSPOSE = "conv2d_transpose"
    DENSE = "dense"
    ADD = "add"
    MEAN = "mean"
    AVG_POOL2D = "avg_pool2d"
    MULTIPLY = "multiply"
    CONCAT = "concat"
    TABLE = "table"


WEIGHTED = (Kind.CONV2D, Kind.DENSE)
"""Taken wherever they fit; what else there is, where its inputs are integers already."""


@dataclass(frozen=True, kw_only=True)
class Int8Scheme:
    """How 8-bit levels are chosen.

    Parameters
    ----------
    symmetric : bool
        Weights about 0; else with a zero point for each output channel, see `weight_offsets`.
    power_of_two : bool
        All scales are powers of two, so that requantization is a shift: its factor changes nothing
        but the exponent of a sum, which up to 2**24 is exact.
    """

    symmetric: bool = True
    power_of_two: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """A chain of bindings that becomes one integer operator.

    Parameters
    ----------
    kind : Kind
        Of the first binding.
    layer : str
        Binding name of the first binding's layer.
    call : relax.Call
        The first binding's value.
    chain : tuple of relax.Var
        The bindings of the chain in order; the last one carries the result.
    inputs : tuple of relax.Var
        The activations that enter, the residual last.
    bias : numpy.ndarray or None
        float64 ``[K]``, the sum of the absorbed bias additions.
    residual : bool
        Whether the last of two inputs is added to the first one's result.
    low, high : float
        Bounds of the absorbed activation, infinite where there is none.
    linear : int
        How many bindings of the chain stand before the activation.
    levels : bool
        Whether the result is levels; else it is the real value of the int32 sum.
    function : callable or None
        Of a table: float64 values of the input → those of the result.
    rounded : numpy.ndarray or None
        int8 levels chosen for the weights, in their shape; to nearest where there are none.
    scheme : Int8Scheme
        How its weights are quantized.
    """

    kind: Kind
    layer: str
    call: relax.Call
    chain: tuple[relax.Var, ...]
    inputs: tuple[relax.Var, ...]
    bias: np.ndarray | None = None
    residual: bool = False
    low: float = -math.inf
    high: float = math.inf
    linear: int = 1
    levels: bool = True
    function: Callable[[np.ndarray], np.ndarray] | None = None
    rounded: np.ndarray | None = None
    scheme: Int8Scheme = Int8Scheme()

    @property
    def output(self) -> relax.Var:
        """The variable that carries the result."""
        return self.chain[-1]

    @property
    def layers(self) -> tuple[str, ...]:
        """Binding names of all layers that the chain computes, in order."""
        return tuple(dict.fromkeys(layer_of(var) for var in self.chain))

    @property
    def weight(self) -> np.ndarray:
        """Constant weight, output channels first: ``[K, R, S, C // groups]`` or ``[K, C]``."""
        values = np.asarray(self.call.args[1].value.numpy())
        if self.kind is Kind.CONV2D_TRANSPOSE:
            return values.transpose(1, 2, 3, 0)
        return values if self.kind is Kind.CONV2D else values.T


class Skipped(NamedTuple):
    """A convolution or matrix product that stays in float, and why."""

    layer: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """What `survey` found.

    Parameters
    ----------
    sites : tuple of Site
        In the order of their results.
    skipped : tuple of Skipped
        Convolutions and matrix products that are no site, with the reason.
    passing : frozenset of relax.Var
        Results of operators that work on levels as they are.
    wanted : tuple of relax.Var
        Activations that something reads as integers, in graph order: each needs a range.
    """

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    passing: frozenset[relax.Var]
    wanted: tuple[relax.Var, ...]
