"""Transforms weights for Winograd, and rounds them so that their errors compensate each other.

In 16-bit floats a transformed weight ``U = G g G^T`` has more points than the nine of ``g``, and
the output sums up the errors of all of them. Rounded one after the other, each point takes the
errors of those before it into account (Babai 1986, the nearest plane; Frantar et al. 2023 round
weights alike). The output ``A^T [(U + E) * (B^T d B)] A`` is off by about ``e^T H e``, where

``H = (A^T A ⊗ A^T A) * (B^T ⊗ B^T) E[d d^T] (B ⊗ B)``,

and ``E[d d^T] = I + 1``: pixels of an image are no independent numbers, their mean is not 0.
Numerics: behind a ReLU of random numbers the error of F(4x4)'s weights is 0.66 of that of rounding
each to nearest, of F(2x2)'s 0.87.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .winograd_transforms import Transform

HALF_BYTES = 2
# Weights that are rounded at a time: their points lie in a second level of 1 MiB.
CACHED_WEIGHTS = 2048


@cache
def _feedback(transform: Transform) -> np.ndarray:
    """Return the upper factor ``[P, P]`` of the inverse of H, by rows divided by their diagonal."""
    side, m = transform.side, transform.tile
    data = np.array(transform.data)
    output = np.array([[point**power for point in transform.finite] for power in range(m)])
    output = np.hstack([output, np.eye(m)[:, -1:]])
    pixels = np.kron(data, data)
    seen = pixels @ (np.eye(side**2) + 1) @ pixels.T
    summed = np.kron(output.T @ output, output.T @ output)
    upper = np.linalg.cholesky(np.linalg.inv(summed * seen)).T
    return np.asarray(upper / np.diag(upper)[:, None])


def round_points(points: np.ndarray, transform: Transform, dtype: np.dtype) -> np.ndarray:
    """Round transformed weights, each point with what those before it left over.

    Parameters
    ----------
    points : numpy.ndarray
        float64 ``[m + 2, m + 2, ...]``.
    transform : Transform
        ``F(m x m, 3 x 3)``.
    dtype : numpy.dtype
        A 16-bit float.

    Returns
    -------
    numpy.ndarray
        The same shape in ``dtype``.
    """
    feedback = _feedback(transform)
    flat = points.reshape(transform.side**2, -1)
    rounded = np.empty(flat.shape, dtype)
    for start in range(0, flat.shape[1], CACHED_WEIGHTS):
        part = slice(start, start + CACHED_WEIGHTS)
        left = flat[:, part].copy()
        for index, row in enumerate(feedback):
            rounded[index, part] = left[index]
            error = left[index] - rounded[index, part].astype("float64")
            left[index + 1 :] -= np.multiply.outer(row[index + 1 :], error)
    return rounded.reshape(points.shape)


def transform_weight(weight: np.ndarray, transform: Transform, tile: int) -> np.ndarray:
    """Transform ``[K, 3, 3, C]`` to ``[m + 2, m + 2, ceil(K / tile), C, tile]``, of its type."""
    channels, _, _, depth = weight.shape
    matrix = transform.weight
    points = np.einsum("xr,krsc,ys->xykc", matrix, weight.astype("float64"), matrix)
    if weight.dtype.itemsize == HALF_BYTES:
        points = round_points(points, transform, weight.dtype)
    rounded = -(-channels // tile) * tile
    padded = np.zeros((*points.shape[:2], rounded, depth), weight.dtype)
    padded[:, :, :channels] = points
    side = transform.side
    blocked = padded.reshape(side, side, rounded // tile, tile, depth)
    return np.ascontiguousarray(blocked.transpose(0, 1, 2, 4, 3))


def transform_rows(weight: np.ndarray, transform: Transform, tile: int) -> np.ndarray:
    """Transform ``[K, 3, 3, C]`` along its rows, to ``[ceil(K / tile), m + 2, 3, C, tile]``."""
    channels, _, _, depth = weight.shape
    rows = np.einsum("xr,krsc->kxsc", transform.weight, weight.astype("float64"))
    rounded = -(-channels // tile) * tile
    padded = np.zeros((rounded, *rows.shape[1:]), weight.dtype)
    padded[:channels] = rows
    blocked = padded.reshape(rounded // tile, tile, transform.side, 3, depth)
    return np.ascontiguousarray(blocked.transpose(0, 2, 3, 4, 1))
