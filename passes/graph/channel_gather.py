"""Says of which channels of which tensors a tensor consists, however they were moved there.

What `FoldChannelMoves` computes with: concatenations, splits, slices, transpositions and reshapes
of the channels of images are lists of channels here, and cost nothing. Numerics: exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tvm import relax

from .dataflow import shape_of

CHANNEL = -1
"""Labels an axis of channels; the others are counted from 0 in the order of N, H, W."""
IMAGE_AXES = (1, 3)
"""Where the channels of an image may lie: NCHW, NHWC."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A tensor that holds images.

    Parameters
    ----------
    var : relax.Var
        Of rank 4.
    axis : int
        Of its channels, 1 (NCHW) or 3 (NHWC).
    """

    var: relax.Var
    axis: int

    @property
    def channels(self) -> int:
        """How many channels it has."""
        return shape_of(self.var)[self.axis]


@dataclass(frozen=True, kw_only=True)
class ChannelGather:
    """A tensor whose every channel is one of a source.

    Parameters
    ----------
    sources : tuple of Source
        In the order of their definition.
    index : ndarray
        ``[*channel axes, 2]`` int64: source and its channel.
    sizes : tuple of int
        ``(N, H, W)``.
    axes : tuple of int
        Label of each axis of the tensor.
    moves : int
        Operators between the sources and the tensor, along the longest way.
    """

    sources: tuple[Source, ...]
    index: np.ndarray
    sizes: tuple[int, ...]
    axes: tuple[int, ...]
    moves: int = 0

    @classmethod
    def of(cls, source: Source, order: np.ndarray | None = None) -> ChannelGather:
        """Return the channels of one source: channel ``c`` is its ``order[c]``, or its c."""
        shape = shape_of(source.var)
        axes = [*range(3)]
        axes.insert(source.axis, CHANNEL)
        channels = np.arange(source.channels) if order is None else order
        return cls(
            sources=(source,),
            index=np.stack([np.zeros_like(channels), channels], axis=-1),
            sizes=tuple(e for a, e in enumerate(shape) if a != source.axis),
            axes=tuple(axes),
        )

    @property
    def flat(self) -> np.ndarray:
        """``[C, 2]``: source and channel, of a tensor with one axis of channels."""
        return self.index.reshape(-1, 2)

    @property
    def order(self) -> np.ndarray:
        """``[C]``: the channels by source and place, so that neighbours stay neighbours."""
        flat = self.flat
        return np.lexsort((flat[:, 1], flat[:, 0]))

    def is_image(self, axis: int) -> bool:
        """Tell whether this is a tensor of rank 4 with channels on an axis."""
        axes = [*range(3)]
        axes.insert(axis, CHANNEL)
        return self.axes == tuple(axes)

    def channel_axis(self, axis: int) -> int | None:
        """Return which axis of channels an axis of the tensor is; None for another one."""
        axis %= len(self.axes)
        return self.axes[:axis].count(CHANNEL) if self.axes[axis] == CHANNEL else None

    def sliced(self, axis: int, chosen: Sequence[int]) -> ChannelGather | None:
        """Return what is left of an axis of channels; None where it is none."""
        place = self.channel_axis(axis)
        if place is None:
            return None
        return self._moved(index=np.take(self.index, list(chosen), axis=place))

    def permuted(self, axes: Sequence[int]) -> ChannelGather:
        """Return the tensor with its axes in another order."""
        found = [self.channel_axis(axis) for axis in axes]
        places = [place for place in found if place is not None]
        return self._moved(
            index=self.index.transpose([*places, self.index.ndim - 1]),
            axes=tuple(self.axes[axis] for axis in axes),
        )

    def reshaped(self, shape: Sequence[int]) -> ChannelGather | None:
        """Return the tensor with its axes of channels divided anew; None for other reshapes."""
        extents = iter(self.index.shape[:-1])
        wanted, axes, channels = list(shape), [], []
        position = 0
        while position < len(self.axes):
            if self.axes[position] != CHANNEL:
                if not wanted or wanted.pop(0) != self.sizes[self.axes[position]]:
                    return None
                axes.append(self.axes[position])
                position += 1
                continue
            group = 1
            while position < len(self.axes) and self.axes[position] == CHANNEL:
                group *= next(extents)
                position += 1
            taken: list[int] = []
            while math.prod(taken) < group or not taken:
                if not wanted:
                    return None
                taken.append(wanted.pop(0))
            if math.prod(taken) != group:
                return None
            channels += taken
            axes += [CHANNEL] * len(taken)
        if wanted:
            return None
        return self._moved(index=self.index.reshape(*channels, 2), axes=tuple(axes))

    def _moved(self, *, index: np.ndarray, axes: tuple[int, ...] | None = None) -> ChannelGather:
        return replace(
            self,
            index=index,
            axes=self.axes if axes is None else axes,
            moves=self.moves + 1,
        )


def joined(parts: Sequence[ChannelGather], axis: int) -> ChannelGather | None:
    """Return a concatenation; None where it is not along an axis of channels that all have."""
    first = parts[0]
    place = first.channel_axis(axis)
    if place is None or any((p.axes, p.sizes) != (first.axes, first.sizes) for p in parts):
        return None
    sources: list[Source] = []
    for part in parts:
        sources += [source for source in part.sources if source not in sources]
    indices = []
    for part in parts:
        numbers = np.array([sources.index(source) for source in part.sources])
        indices.append(np.stack([numbers[part.index[..., 0]], part.index[..., 1]], axis=-1))
    return replace(
        first,
        sources=tuple(sources),
        index=np.concatenate(indices, axis=place),
        moves=max(part.moves for part in parts) + 1,
    )


def runs(flat: np.ndarray) -> list[tuple[int, int, int]]:
    """Return ``(source, first, end)`` of each run of neighbouring channels of ``[C, 2]``.

    Channels 4, 5, 6 of source 0 and 0, 1 of source 1 are ``[(0, 4, 7), (1, 0, 2)]``.
    """
    found: list[tuple[int, int, int]] = []
    for source, channel in flat.tolist():
        if found and found[-1][0] == source and found[-1][2] == channel:
            found[-1] = (source, found[-1][1], channel + 1)
        else:
            found.append((source, channel, channel + 1))
    return found
