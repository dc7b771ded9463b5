"""The second moments of a layer's input: all that adaptive rounding has to know of the data.

Reads activations in NHWC, sample by sample; memory is that of one sample's windows and of the
moments, however many samples there are. Numerics: float32 sums.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from hone.errors import ModelError
from hone.passes.graph.dataflow import shape_of

from .site import Kind, Site


class GramObserver:
    """Streams ``[G, D, D]``: the mean of ``x xᵀ`` over every window that a layer's filters see.

    x has the order of the layer's weights ``[K, D]``, taps first and then channels, padding
    included: D is ``R × S × C // groups`` for a convolution, C for a matrix product. One G for
    each group of a convolution.

    Parameters
    ----------
    site : Site
        A convolution or matrix product.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._groups = groups_of(site)
        self._sum = np.zeros(gram_shape(site), np.float32)
        self._count = 0

    def update(self, values: np.ndarray) -> None:
        """Take the layer's input for one sample: ``[N, H, W, C]``, or ``[..., C]``."""
        for rows in self._rows(np.asarray(values, np.float32)):
            self._count += rows.shape[1]
            self._sum += rows.transpose(0, 2, 1) @ rows

    @property
    def gram(self) -> np.ndarray:
        """Mean of everything seen so far, float32.

        Raises
        ------
        ModelError
            Nothing was seen.
        """
        if not self._count:
            raise ModelError("calibration saw no value", where=self._site.layer)
        return np.asarray(self._sum / np.float32(self._count))

    def _rows(self, values: np.ndarray) -> list[np.ndarray]:
        """Return ``[G, windows, D]`` for each image, or once for a matrix product."""
        if self._site.kind is Kind.DENSE:
            return [values.reshape(1, -1, values.shape[-1])]
        attrs = self._site.call.attrs
        top, left, bottom, right = (int(p) for p in attrs.padding)
        _, taps_y, taps_x, depth = self._site.weight.shape
        _, height, width, _ = shape_of(self._site.chain[0])
        (step_y, step_x), (gap_y, gap_x) = (
            tuple(int(v) for v in extents) for extents in (attrs.strides, attrs.dilation)
        )
        reach = (gap_y * (taps_y - 1) + 1, gap_x * (taps_x - 1) + 1)
        result = []
        for image in values:
            padded = np.pad(image, ((top, bottom), (left, right), (0, 0)))
            # [rows, columns, C, taps, taps] without a copy
            windows = sliding_window_view(padded, reach, axis=(0, 1))
            windows = windows[::step_y, ::step_x, :, ::gap_y, ::gap_x][:height, :width]
            grouped = windows.reshape(height * width, self._groups, depth, taps_y, taps_x)
            result.append(
                np.ascontiguousarray(grouped.transpose(1, 0, 3, 4, 2)).reshape(
                    self._groups, height * width, -1
                )
            )
        return result


def groups_of(site: Site) -> int:
    """Return how many groups a layer's channels form."""
    return 1 if site.kind is Kind.DENSE else int(site.call.attrs.groups)


def gram_shape(site: Site) -> tuple[int, int, int]:
    """Return ``(G, D, D)``."""
    depth = site.weight[0].size
    return groups_of(site), depth, depth
