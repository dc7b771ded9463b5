"""How much each channel of a group matters, from the weights alone.

Reads constants; rewrites nothing. Best after batch norm is folded: the filters then carry the
scale that the network really applies.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np

from .channel_flow import ChannelFlow, Role


class Norm(StrEnum):
    """The norm of a filter."""

    L1 = "l1"
    L2 = "l2"


def channel_importance(flow: ChannelFlow, norm: Norm) -> dict[int, np.ndarray]:
    """Return the importance of each channel of each set that has filters.

    The norm of each filter divided by the mean norm of its layer, averaged over the layers that
    share the channels (Li et al. 2017, "Pruning Filters for Efficient ConvNets", extended to
    coupled layers as in Fang et al. 2023, "DepGraph"). Two layers with the filter norms [1, 3] and
    [2, 2] that meet in a residual add give [0.75, 1.25].

    Returns
    -------
    dict of int to ndarray
        Representative of the set → importance [size], float32 so that rounding in sums of another
        order makes no difference.
    """
    members: dict[int, list[np.ndarray]] = {}
    for cut in flow.cuts:
        if cut.role not in (Role.PRODUCER, Role.FILTER):
            continue
        weight = flow.graph.constant(flow.graph.definition[cut.var].args[cut.argument])
        filters = np.moveaxis(np.asarray(weight, np.float64), cut.axis, 0)
        norms = filter_norms(filters.reshape(filters.shape[0], -1), norm)
        begin = 0
        for segment in cut.segments:
            size = flow.size(segment.channels)
            part = norms[begin : begin + size * segment.repeat].reshape(size, segment.repeat)
            begin += size * segment.repeat
            # A depthwise multiplier gives a channel several filters: they count as one.
            joined = filter_norms(part, norm)
            mean = joined.mean()
            relative = joined / mean if mean > 0 else joined
            members.setdefault(flow.root(segment.channels), []).append(relative)
    return {
        root: np.mean(relatives, axis=0).astype(np.float32) for root, relatives in members.items()
    }


def filter_norms(filters: np.ndarray, norm: Norm) -> np.ndarray:
    """Return the norm of each row: filters [channels, weights] → [channels]."""
    if norm is Norm.L1:
        return np.asarray(np.abs(filters).sum(axis=1))
    return np.asarray(np.sqrt(np.square(filters).sum(axis=1)))
