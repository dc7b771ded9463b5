"""Adaptive rounding: learns for each weight whether it goes to the level above or the one below.

Rounding every weight to nearest is best for the weights, not for what the layer computes: the
errors of two weights that read inputs of like sign add up or cancel. Computes levels for the
quantizers; rewrites nothing. Numerics: a weight moves by less than one step of its scale, and the
layer's squared error over the calibration data is never above that of rounding to nearest.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Final

import numpy as np

from hone.errors import UsageError

from .qparams import QuantizedType

STEPS: Final = 1000
"""Of the optimizer: measured on correlated inputs, three times as many gain another 1% or less."""

SWEEPS: Final = 4
"""Over single weights afterwards, at most; the first finds nearly all that there is to find."""

# Ends of the stretched sigmoid, and share of the steps before the regularizer sets in: Nagel et al.
# 2020, section 3.2 and the released code.
_LOW, _HIGH = -0.1, 1.1
_WARM_UP = 0.2
_BETA_START, _BETA_END = 20.0, 2.0
_LEARNING_RATE = 0.02
_REGULARIZER = 0.1
_MOMENTS = (0.9, 0.999)
_EPSILON = 1e-8
_NOISE = 1e-5


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounding:
    """Levels of a layer's weights, and what they are worth.

    Parameters
    ----------
    levels : numpy.ndarray
        ``[K, D]`` of the type's dtype.
    nearest_error : float
        Mean squared error of an output with every weight rounded to nearest.
    error : float
        The same with these levels; never above `nearest_error`.
    kept : int
        Output channels that stay as rounded to nearest, because learning did not make them better.
    steps : int
        Optimizer steps taken.
    """

    levels: np.ndarray
    nearest_error: float
    error: float
    kept: int
    steps: int


def learn_rounding(
    weight: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    gram: np.ndarray,
    *,
    type: QuantizedType,
    steps: int = STEPS,
    seconds: float = math.inf,
) -> Rounding:
    """Choose the level below or above for every weight, so that the layer's output changes least.

    With ``X`` the layer's inputs, one column for each position of each sample, and the error of the
    weights ``d = W~ - W``, the mean squared error of output channel k over the data is exactly ::

        mean((W~[k] X - W[k] X)²) = d[k]ᵀ G d[k],    G = X Xᵀ / columns

    so the samples are needed once, for G, and never again: memory does not grow with them, and a
    step is one matrix product instead of a forward and a backward pass. As in AdaRound, the choice
    is relaxed: ``W~ = scale × (floor(W / scale) + h(V))`` with the rectified sigmoid
    ``h(V) = clamp(1.2 σ(V) - 0.1, 0, 1)``, begun where ``W~ = W``, and Adam minimizes ::

        Σ over channels of error / nearest_error  +  0.1 Σ over weights of (1 - |2h - 1|^β)

    where β falls from 20 to 2 as a cosine after the first fifth of the steps and pulls every h to 0
    or 1. The division gives all channels the same importance to Adam; it changes no minimum,
    because channels share no weight. At last single weights are turned over as long as that lowers
    the error, which also parts weights that are alike, from there and from nearest; the better end
    counts, and nearest itself where nothing is better.

    Worked number: weights [0.4, 0.4, 0.4] of scale 1 and inputs that are always equal, G full of
    ones: to nearest gives [0, 0, 0] and the output 0 instead of 1.2, squared error 1.44; [1, 0, 0]
    gives 1, squared error 0.04.

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (ICML
    2020), equations 13, 21 to 25; without the following activation and with the inputs of the
    float network, which in its table 6 are worth 0.2 points of ResNet-18's top-1 in 4 bits.

    Parameters
    ----------
    weight : numpy.ndarray
        float32 ``[K, D]``: one row for each output channel.
    scale : numpy.ndarray
        float32, broadcasts to ``[K, D]``.
    zero_point : numpy.ndarray
        Integers, broadcasts to ``[K, D]``.
    gram : numpy.ndarray
        ``[G, D, D]``: mean of ``x xᵀ`` for each group of the layer, from `GramObserver`; K is a
        multiple of G.
    type : QuantizedType
        Levels to use.
    steps : int
        Of the optimizer.
    seconds : float
        Stops earlier; the annealing follows, so that every weight still is decided.

    Raises
    ------
    UsageError
        Shapes, steps or seconds do not fit.
    """
    groups = _check(weight, gram, steps, seconds)
    target = weight.reshape(groups, -1, weight.shape[1]).astype(np.float32)
    scale = np.broadcast_to(scale, weight.shape).reshape(target.shape).astype(np.float32)
    offset = np.broadcast_to(zero_point, weight.shape).reshape(target.shape)
    low = (type.quant_min - offset).astype(np.float32)
    high = (type.quant_max - offset).astype(np.float32)
    ratio = target * (np.float32(1.0) / scale)
    nearest = np.rint(np.clip(ratio, low, high))
    below = np.clip(np.floor(ratio), low, high - 1)
    problem = _Problem(target=target, scale=scale, gram=gram.astype(np.float32))
    nearest_error = problem.errors(nearest)
    up, taken = _learn(problem, below, ratio, nearest_error, steps, seconds)
    levels, error = nearest, nearest_error
    for start in (up, nearest - below):
        found = _turn_over(problem, below, start)
        found_error = problem.errors(found)
        levels = np.where((found_error < error)[..., None], found, levels)
        error = np.minimum(found_error, error)
    levels = levels.astype(np.int32) + offset
    return Rounding(
        levels=levels.reshape(weight.shape).astype(type.dtype),
        nearest_error=float(nearest_error.mean()),
        error=float(error.mean()),
        kept=int((error == nearest_error).sum()),
        steps=taken,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Problem:
    """Weights ``[G, K / G, D]`` and what their errors cost, ``[G, D, D]``."""

    target: np.ndarray
    scale: np.ndarray
    gram: np.ndarray

    def errors(self, steps: np.ndarray) -> np.ndarray:
        """Return the mean squared error of each output channel, float64 ``[G, K / G]``."""
        change = self.change(steps)
        return np.asarray((change * (change @ self.gram)).sum(-1, dtype=np.float64))

    def change(self, steps: np.ndarray) -> np.ndarray:
        return np.asarray(steps * self.scale - self.target)


def _learn(
    problem: _Problem,
    below: np.ndarray,
    ratio: np.ndarray,
    nearest_error: np.ndarray,
    steps: int,
    seconds: float,
) -> tuple[np.ndarray, int]:
    """Return for each weight 0 (the level below) or 1 (above), and the steps taken."""
    started = time.monotonic()
    share = np.clip(ratio - below, 0.0, 1.0)
    variable = -np.log((_HIGH - _LOW) / (share - _LOW) - 1.0)
    first, second = np.zeros_like(variable), np.zeros_like(variable)
    smallest = np.finfo(np.float32).tiny
    weight_of = (2.0 / np.maximum(nearest_error, smallest))[..., None].astype(np.float32)
    pull = np.float32(_REGULARIZER)
    step = 0
    done = 0.0
    while done < 1.0:
        sigmoid = 1.0 / (1.0 + np.exp(-variable))
        stretched = sigmoid * np.float32(_HIGH - _LOW) + np.float32(_LOW)
        up = np.clip(stretched, 0.0, 1.0)
        slope = (problem.change(below + up) @ problem.gram) * problem.scale * weight_of
        if done > _WARM_UP:
            progress = (done - _WARM_UP) / (1.0 - _WARM_UP)
            beta = _BETA_END + 0.5 * (_BETA_START - _BETA_END) * (1 + math.cos(progress * math.pi))
            centred = 2.0 * up - 1.0
            slope -= pull * np.float32(2 * beta) * np.sign(centred) * np.abs(centred) ** (beta - 1)
        slope *= sigmoid * (1.0 - sigmoid) * np.float32(_HIGH - _LOW)
        slope[(stretched < 0.0) | (stretched > 1.0)] = 0.0
        step += 1
        first += np.float32(1 - _MOMENTS[0]) * (slope - first)
        second += np.float32(1 - _MOMENTS[1]) * (slope * slope - second)
        size = _LEARNING_RATE * math.sqrt(1 - _MOMENTS[1] ** step) / (1 - _MOMENTS[0] ** step)
        variable -= np.float32(size) * first / (np.sqrt(second) + np.float32(_EPSILON))
        done = max(step / steps, (time.monotonic() - started) / seconds)
    return (variable >= 0.0).astype(np.float32), step


def _turn_over(problem: _Problem, below: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Return the steps when no single weight can change sides and lower its channel's error."""
    steps = np.asarray(below + up)
    way = 1.0 - 2.0 * up
    change = problem.change(steps)
    slope = change @ problem.gram
    for _ in range(SWEEPS):
        turned = False
        for index in range(steps.shape[-1]):
            move = way[..., index] * problem.scale[..., index]
            curve = problem.gram[:, index, index, None]
            gain = -move * (2.0 * slope[..., index] + move * curve)
            # What float32 sums cannot tell from nothing is no gain.
            better = gain > _NOISE * np.abs(move * slope[..., index])
            for group, channel in zip(*np.nonzero(better), strict=True):
                steps[group, channel, index] += way[group, channel, index]
                way[group, channel, index] *= -1.0
                slope[group, channel] += move[group, channel] * problem.gram[group, index]
                turned = True
        if not turned:
            break
    return steps


def _check(weight: np.ndarray, gram: np.ndarray, steps: int, seconds: float) -> int:
    """Return the number of groups."""
    depth = weight.shape[-1]
    if weight.ndim != 2 or gram.ndim != 3 or gram.shape[1:] != (depth, depth):
        raise UsageError(
            "rounding needs weights [K, D] and their inputs' products [G, D, D], given are "
            f"{list(weight.shape)} and {list(gram.shape)}"
        )
    if len(weight) % len(gram):
        raise UsageError(f"{len(weight)} output channels do not make {len(gram)} groups")
    if steps < 1 or not seconds > 0.0:
        raise UsageError(f"rounding needs steps and seconds above 0, not {steps} and {seconds}")
    return len(gram)
