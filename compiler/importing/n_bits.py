"""onnxruntime's MatMulNBits: a matrix product with a weight of 2, 4 or 8 bits in blocks along K."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import ml_dtypes
import numpy as np
import onnx

from .graph import attributes

OPERATOR: Final = "MatMulNBits"
"""In the domain ``com.microsoft``."""

LEVEL_TYPES: Final = {2: ml_dtypes.uint2, 4: ml_dtypes.uint4, 8: np.uint8}
"""By bits."""

_NAMES: Final = ("A", "B", "scales", "zero_points", "g_idx", "bias")


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A weight ``[K, N]`` as DequantizeLinear takes it.

    Parameters
    ----------
    levels : numpy.ndarray
        Unsigned integers of ``bits`` bits, ``[K, N]``.
    scale : numpy.ndarray
        ``[ceil(K / size), N]``.
    zero_point : numpy.ndarray
        The shape of ``scale``: integers of the levels' type, or floats.
    size : int
        Of a block along K.
    """

    levels: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    size: int

    @property
    def real(self) -> np.ndarray:
        """Return the weights in the type of the scales, for zero points between two levels."""

        def along(values: np.ndarray) -> np.ndarray:
            return np.repeat(values.astype(np.float64), self.size, 0)[: len(self.levels)]

        weight = (self.levels.astype(np.float64) - along(self.zero_point)) * along(self.scale)
        return np.asarray(weight.astype(self.scale.dtype))


def obstacle(proto: onnx.NodeProto, constants: Mapping[str, np.ndarray]) -> tuple[str, str] | None:
    """Return why a MatMulNBits cannot be imported, and what to do; None for any other node.

    Parameters
    ----------
    proto : onnx.NodeProto
        Any node.
    constants : mapping of str to ndarray
        The graph's constants by name.
    """
    if (proto.domain, proto.op_type) != ("com.microsoft", OPERATOR):
        return None
    attrs = attributes(proto)
    missing = [name for name in ("K", "N", "block_size") if int(attrs.get(name, 0)) < 1]
    if missing:
        return f"attribute {missing[0]} is required, a whole number from 1", ""
    k, n, size, bits = (int(attrs.get(key, 4)) for key in ("K", "N", "block_size", "bits"))
    if bits not in LEVEL_TYPES:
        return f"weights of {bits} bits are unsupported; 2, 4 and 8 are supported", ""
    if size * bits % 8:
        return f"a block of {size} weights of {bits} bits is no whole number of bytes", ""
    given = dict(zip(_NAMES, proto.input, strict=False))
    if given.get("g_idx"):
        return (
            "g_idx spreads the blocks over the input channels, which is unsupported",
            "quantize the model without reordering (act-order) of its channels",
        )
    blocks = math.ceil(k / size)
    counts = {"B": n * blocks * size * bits // 8, "scales": n * blocks}
    for name in ("B", "scales", "zero_points"):
        source = given.get(name, "")
        if not source and name == "zero_points":
            continue
        if source not in constants:
            return f"{name} must be a constant", "" if source else "the input is left out"
        value = constants[source]
        count = counts.get(name, 0)
        if name == "zero_points":
            packed = value.dtype == np.uint8
            count = n * math.ceil(blocks * bits / 8) if packed else n * blocks
        if value.size != count:
            return (
                f"{name} has {value.size} elements; K = {k}, N = {n}, bits = {bits} and "
                f"block_size = {size} need {count}"
            ), ""
        if name == "B" and value.dtype != np.uint8:
            return f"B is {value.dtype}, required is uint8", ""
    return None


def read_blocks(proto: onnx.NodeProto, constants: Mapping[str, np.ndarray]) -> Blocks:
    """Return the weight of a MatMulNBits that has no `obstacle`.

    Without zero points all are ``2^(bits-1)``. Whole zero points that are given as floats become
    integers.

    Source: onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits: the first level is in
    the lowest bits of a byte.
    """
    attrs = attributes(proto)
    k, n, size, bits = (int(attrs.get(key, 4)) for key in ("K", "N", "block_size", "bits"))
    blocks = math.ceil(k / size)
    kind = LEVEL_TYPES[bits]
    levels = _fields(constants[proto.input[1]].reshape(n, -1), bits)[:, :k]
    scale = constants[proto.input[2]].reshape(n, blocks)
    given = proto.input[3] if len(proto.input) > 3 else ""
    points = np.full((n, blocks), 1 << (bits - 1), np.uint8)
    if given and constants[given].dtype == np.uint8:
        points = _fields(constants[given].reshape(n, -1), bits)[:, :blocks]
    elif given:
        points = constants[given].reshape(n, blocks)
        whole = (points == np.rint(points)) & (points >= 0) & (points < 1 << bits)
        if whole.all():
            points = points.astype(np.uint8)
    return Blocks(
        levels=np.ascontiguousarray(levels.T).astype(kind),
        scale=np.ascontiguousarray(scale.T),
        zero_point=np.ascontiguousarray(points.T).astype(
            kind if points.dtype == np.uint8 else points.dtype
        ),
        size=size,
    )


def _fields(packed: np.ndarray, bits: int) -> np.ndarray:
    """Return the fields of bytes along the last axis, from the lowest bits on: uint8."""
    fields = (packed[..., None] >> np.arange(0, 8, bits, dtype=np.uint8)) & ((1 << bits) - 1)
    return np.asarray(fields.reshape(len(packed), -1), np.uint8)
