"""Levels that another tool chose, in the fewest bits that hold them. Numerics: exact."""

from __future__ import annotations

import numpy as np

from .weight_schemes import STORED_BITS, WeightLevels


def given_levels(
    levels: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, *, group: int
) -> WeightLevels | str:
    """Return levels as the packed kernels take them: ``weight = scale × (level - zero_point)``.

    Levels and zero points may be moved together, which changes no weight: unsigned levels of b
    bits become signed ones, less ``2^(b-1)``. A zero point that is taken off the levels without
    need of another bit is not stored.

    Worked number: the unsigned levels 3 and 12 with zero point 8 become -5 and 4 of 4 bits, and no
    zero point is left.

    Parameters
    ----------
    levels : numpy.ndarray
        Integers ``[K, D]``.
    scale : numpy.ndarray
        ``[K, ceil(D / group)]``, or ``[1, 1]`` with a group of D.
    zero_point : numpy.ndarray
        Integers, the shape of ``scale``.
    group : int
        Neighbours along D that share a scale.

    Returns
    -------
    WeightLevels or str
        Or the reason why the kernels cannot have them.
    """
    if not np.isfinite(scale).all():
        return "a scale of its weights is not finite"
    wide, points = levels.astype(np.int64), zero_point.astype(np.int64)
    centred = wide - np.repeat(points, group, axis=1)[:, : levels.shape[1]]
    for bits in STORED_BITS:
        half = 1 << (bits - 1)
        if _within(centred, half):
            return _stored(centred, scale, None, bits, group)
        for shift in (0, half):
            if _within(wide - shift, half) and _within(points - shift, 128):
                return _stored(wide - shift, scale, points - shift, bits, group)
    return f"its levels reach from {wide.min()} to {wide.max()}, beyond 8 bits"


def _within(values: np.ndarray, half: int) -> bool:
    return bool(values.min() >= -half and values.max() < half)


def _stored(
    levels: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, bits: int, group: int
) -> WeightLevels:
    return WeightLevels(
        levels=np.ascontiguousarray(levels, np.int8),
        scale=np.ascontiguousarray(scale, np.float32),
        zero_point=None if zero_point is None else np.ascontiguousarray(zero_point, np.int8),
        bits=bits,
        group=group,
    )
