"""1x1 convolutions and matrix products by products of sums, for cores that add beside multiplying.

Winograd's inner product (S. Winograd, "A New Algorithm for Inner Product", IEEE Transactions on
Computers C-17, 1968): with H half of the channels,

``sum_c x[c] w[c] = sum_{j < H} (x[j] + w[j + H]) (x[j + H] + w[j]) - sum_j x[j] x[j + H]
- sum_j w[j] w[j + H]``.

Two multiply-adds become one and two additions. The second sum is one number for each pixel, the
third one for each output channel, known now. With two units that add beside two that multiply and
add, and one addition in four made by the latter, all four are busy: 12 sums and products in three
cycles where the plain form takes four.

Numerics: sums of other numbers are rounded. Weights are scaled by a power of two for each output
channel so that their root mean square is near 1, about that of activations; the scale is taken back
behind the sum. The error of random data is two to four times that of the plain form; it grows with
the square of activations whose neighbours at a distance of H are as large. Hence only data of a
known scale is multiplied so (`known_scale`), and `hone.driver` compiles a model without them where
they make it differ from onnxruntime. Where an input is infinite, or a product of two of one pixel
overflows, its results are NaN (``inf - inf``).
"""

from __future__ import annotations

from functools import partial

import numpy as np
from tvm import relax, te, tirx

from hone.targets.adder_intrinsics import sum_by_product
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.pairs import VECTORS

from .anchors import ANCHOR


def pack(weight: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scaled weights and what takes the scale back.

    Parameters
    ----------
    weight : np.ndarray
        ``[K, C]`` float32; C even, K a multiple of two vectors.
    lanes : int
        Of a vector.

    Returns
    -------
    tuple of np.ndarray
        ``[K / tk, C / 2, 2, tk]``: of a tile of ``tk = 2 lanes`` output channels for each pair of
        input channels the weights of the second one, then of the first; and ``[2, K]``: factors of
        the sums, and what is added to them then. Weights of root mean square 0.1 are multiplied by
        8, and the factor is 1/8.
    """
    channels, depth = weight.shape
    half, tile = depth // 2, VECTORS * lanes
    spread = np.sqrt(np.mean(np.square(weight, dtype=np.float64), axis=1))
    exponent = np.where(spread > 0, np.round(np.log2(np.where(spread > 0, spread, 1.0))), 0.0)
    scaled = np.ldexp(weight.astype(np.float64), -exponent.astype(np.int64)[:, None])
    own = np.sum(scaled[:, :half] * scaled[:, half:], axis=1)
    behind = np.stack([np.exp2(exponent), -np.exp2(exponent) * own]).astype(np.float32)
    sides = np.stack([scaled[:, half:], scaled[:, :half]], axis=1).astype(np.float32)
    blocked = sides.reshape(channels // tile, tile, 2, half)
    return np.ascontiguousarray(blocked.transpose(0, 3, 2, 1)), behind


def pairs_product(
    data: te.Tensor, weight: te.Tensor, behind: te.Tensor, *, lanes: int
) -> te.Tensor:
    """Return ``[..., C] x [C, K]`` with what `pack` returned; a 1x1 convolution over NHWC is one.

    Parameters
    ----------
    data, weight, behind : te.Tensor
        The left side, weights, and factors and terms of the sums.
    lanes : int
        Of a vector.
    """
    *lead, _ = (int(extent) for extent in data.shape)
    blocks, half, _, tile = (int(extent) for extent in weight.shape)
    channels = blocks * tile
    strip = int(np.gcd(half, lanes))
    step = te.reduce_axis((0, half // strip), "step")
    lane = te.reduce_axis((0, strip), "lane")
    c = te.reduce_axis((0, half), "c")

    def own_product(*i: tirx.Var) -> tirx.Expr:
        *at, lane = i
        first = step * strip + lane
        return te.sum(data[(*at, first)] * data[(*at, half + first)], axis=step)

    lanes_of_own = te.compute((*lead, strip), own_product, name="pair_lanes")
    own = te.compute(
        lead, lambda *at: te.sum(lanes_of_own[(*at, lane)], axis=lane), name="pair_own"
    )

    def product(*i: tirx.Var) -> tirx.Expr:
        *at, k = i
        first, second = data[(*at, c)], data[(*at, half + c)]
        for_first, for_second = (weight[k // tile, c, which, k % tile] for which in (0, 1))
        by_product = k % tile // lanes == tile // lanes - 1
        left = tirx.Select(by_product, sum_by_product(first, for_first), first + for_first)
        return te.sum(left * (second + for_second), axis=c)

    sums = te.compute((*lead, channels), product, name="pair_acc")

    def result(*i: tirx.Var) -> tirx.Expr:
        *at, k = i
        return (sums[i] - own[tuple(at)]) * behind[0, k] + behind[1, k]

    return te.compute((*lead, channels), result, name="pair_result")


def lower_product(
    machine: Machine, bb: relax.BlockBuilder, data: relax.Expr, weight: np.ndarray, *, name: str
) -> relax.Expr:
    """Return the call of the kernel of ``[..., C] x [C, K]``, named after what it computes."""
    packed, behind = pack(weight.T, machine.lanes)
    return bb.call_te(
        partial(pairs_product, lanes=machine.lanes),
        data,
        relax.const(packed),
        relax.const(behind),
        primfunc_name_hint=name,
        primfunc_attrs=ANCHOR,
    )
