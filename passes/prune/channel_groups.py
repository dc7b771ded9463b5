"""Finds the groups of channels that can only be removed together.

Reads a module; rewrites nothing. Runs on high-level operators with constant weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import tvm

from hone.passes.graph.dataflow import layer_of

from .channel_flow import ChannelFlow, Role


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Channels that several layers share: a residual chain, or one layer's output.

    Parameters
    ----------
    producers : tuple of str
        Layer ids of the convolutions and matmuls whose filters are the channels, in graph order.
    coupled : tuple of str
        Layer ids that hold something per channel: depthwise weights, batch norms, biases.
    consumers : tuple of str
        Layer ids whose weights read the channels.
    size : int
        Number of channels.
    reason_frozen : str or None
        Why no channel can be removed, or None where it can.
    channels : int
        Representative of the channel set in the `ChannelFlow` that found it.
    """

    producers: tuple[str, ...]
    coupled: tuple[str, ...]
    consumers: tuple[str, ...]
    size: int
    reason_frozen: str | None
    channels: int = field(repr=False, compare=False)


def find(module: tvm.IRModule, function: str = "main") -> tuple[ChannelGroup, ...]:
    """Return every group of coupled channels, in the order of their first producer.

    Raises
    ------
    ModelError
        The function is not one dataflow block.
    """
    return groups_of(ChannelFlow(module[function]))


def groups_of(flow: ChannelFlow) -> tuple[ChannelGroup, ...]:
    """Return the groups of an analysed function. See `find`."""
    layers: dict[int, dict[Role, list[str]]] = {}
    for cut in flow.cuts:
        for root in dict.fromkeys(flow.root(segment.channels) for segment in cut.segments):
            roles = layers.setdefault(root, {})
            names = roles.setdefault(cut.role, [])
            if layer_of(cut.var) not in names:
                names.append(layer_of(cut.var))
    return tuple(
        ChannelGroup(
            producers=tuple(roles[Role.PRODUCER]),
            coupled=tuple(
                dict.fromkeys(
                    name
                    for name in (*roles.get(Role.FILTER, ()), *roles.get(Role.COUPLED, ()))
                    if name not in roles[Role.PRODUCER]
                )
            ),
            consumers=tuple(roles.get(Role.CONSUMER, ())),
            size=flow.size(root),
            reason_frozen=flow.reason(root),
            channels=root,
        )
        for root, roles in layers.items()
        if Role.PRODUCER in roles
    )
