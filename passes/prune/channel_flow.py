"""Follows channels through a graph: which constants must shrink together.

Reads a Relax function; rewrites nothing. Runs on high-level operators, in any layout, before or
after batch norm is folded. The rules of the operators are in `channel_rules`.

Each tensor has at most one axis whose channels are followed. A *channel set* is what one
convolution or matmul puts out; an elementwise add unites two sets, a concat puts them side by
side, a flatten repeats each channel once per pixel. Whatever the rules do not know freezes the
sets that reach it, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from tvm import relax

from hone.passes.graph.dataflow import Dataflow, layer_of, shape_of, variables


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of positions along an axis: every channel of one set, each `repeat` times in a row."""

    channels: int
    repeat: int = 1


@dataclass(frozen=True, kw_only=True)
class Track:
    """The axis of a tensor whose channels are followed, and what is along it."""

    axis: int
    segments: tuple[Segment, ...]


class Role(StrEnum):
    """What a constant does for a channel set."""

    PRODUCER = "producer"
    FILTER = "filter"
    COUPLED = "coupled"
    CONSUMER = "consumer"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A constant operand that shrinks along one axis when channels are removed.

    Parameters
    ----------
    var : relax.Var
        The binding whose call takes the constant.
    argument : int
        Position of the constant among the call's arguments.
    axis : int
        Axis of the constant.
    segments : tuple of Segment
        What is along that axis.
    role : Role
        PRODUCER for the weight whose filters are the channels, FILTER for a depthwise weight,
        COUPLED for a constant per channel, CONSUMER for a weight that reads them.
    """

    var: relax.Var
    argument: int
    axis: int
    segments: tuple[Segment, ...]
    role: Role


class ChannelFlow:
    """The channel sets of a function, and every place where they leave a mark.

    Parameters
    ----------
    function : relax.Function
        One dataflow block.

    Attributes
    ----------
    cuts : list of Cut
        Constants to shrink, in graph order.
    reshapes : dict of relax.Var to Track
        Reshape calls whose target shape shrinks along the track's axis.
    depthwise : dict of relax.Var to tuple of Segment
        Depthwise convolutions, whose ``groups`` is the number of channels of their input.
    """

    def __init__(self, function: relax.Function) -> None:
        from .channel_rules import follow

        self.graph = Dataflow(function)
        self.cuts: list[Cut] = []
        self.reshapes: dict[relax.Var, Track] = {}
        self.depthwise: dict[relax.Var, tuple[Segment, ...]] = {}
        self._tracks: dict[relax.Var, Track] = {}
        self._parent: list[int] = []
        self._sizes: list[int] = []
        self._reasons: dict[int, str] = {}
        for binding in self.graph.bindings:
            if self.graph.constant(binding.var) is not None:
                continue
            track = follow(self, binding.var, binding.value)
            if track is not None:
                self._tracks[binding.var] = track
        for output in self.graph.outputs:
            for var in variables(output):
                self.freeze(self.track(var), "the channels are an output of the network")

    def track(self, expr: relax.Expr) -> Track | None:
        """Return what is known about the channels of a tensor."""
        expr = self.graph.resolve(expr)
        return self._tracks.get(expr) if isinstance(expr, relax.Var) else None

    def new(self, size: int) -> Segment:
        """Open a channel set of `size` channels."""
        self._parent.append(len(self._parent))
        self._sizes.append(size)
        return Segment(channels=len(self._parent) - 1)

    def opaque(self, size: int, reason: str) -> Segment:
        """Open a frozen channel set, for positions of unknown origin."""
        segment = self.new(size)
        self._reasons[segment.channels] = reason
        return segment

    def root(self, channels: int) -> int:
        """Return the representative of a channel set."""
        while self._parent[channels] != channels:
            channels = self._parent[channels]
        return channels

    def size(self, channels: int) -> int:
        """Return how many channels a set has."""
        return self._sizes[self.root(channels)]

    def reason(self, channels: int) -> str | None:
        """Return why a channel set cannot shrink, or None."""
        return self._reasons.get(self.root(channels))

    def freeze(self, track: Track | None, reason: str) -> None:
        """Forbid to remove any channel along a track; the first reason is kept."""
        for segment in track.segments if track is not None else ():
            self._reasons.setdefault(self.root(segment.channels), reason)

    def unite(self, a: Track, b: Track, where: str) -> Track:
        """Make the channels along two tracks the same ones, position by position."""
        same = len(a.segments) == len(b.segments) and all(
            (self.size(one.channels), one.repeat) == (self.size(two.channels), two.repeat)
            for one, two in zip(a.segments, b.segments, strict=True)
        )
        if not same:
            reason = f"the channels meet others, composed differently, in {where!r}"
            self.freeze(a, reason)
            self.freeze(b, reason)
            return a
        for one, two in zip(a.segments, b.segments, strict=True):
            first, second = sorted((self.root(one.channels), self.root(two.channels)))
            if first != second:
                self._parent[second] = first
                if second in self._reasons:
                    self._reasons.setdefault(first, self._reasons.pop(second))
        return a

    def cut(
        self, var: relax.Var, argument: int, axis: int, segments: tuple[Segment, ...], role: Role
    ) -> None:
        """Note a constant that shrinks with the channels."""
        self.cuts.append(Cut(var=var, argument=argument, axis=axis, segments=segments, role=role))

    def width(self, segments: tuple[Segment, ...], keep: dict[int, np.ndarray]) -> int:
        """Return how many positions are left along segments. See `positions`."""
        return int(self.positions(segments, keep).size)

    def positions(self, segments: tuple[Segment, ...], keep: dict[int, np.ndarray]) -> np.ndarray:
        """Return the positions that stay along segments, ascending.

        Parameters
        ----------
        segments : tuple of Segment
            What is along the axis.
        keep : dict of int to ndarray of bool
            Representative of a channel set → which of its channels stay. Absent sets stay whole.
        """
        masks = []
        for segment in segments:
            mask = keep.get(self.root(segment.channels))
            if mask is None:
                mask = np.ones(self.size(segment.channels), bool)
            masks.append(np.repeat(mask, segment.repeat))
        return np.flatnonzero(np.concatenate(masks))

    def where(self, var: relax.Var) -> str:
        """Return the layer id of a binding."""
        return layer_of(var)

    def extent(self, expr: relax.Expr, axis: int) -> int:
        """Return the extent of a tensor along an axis."""
        return shape_of(expr)[axis]
