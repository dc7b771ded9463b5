"""Removes whole channels with the smallest filters; shapes shrink through everything coupled.

Rewrites the weights of convolutions and matmuls, what is stored per channel behind them, and the
weights that read them. Runs on high-level operators with constant weights, best after
`FoldBatchNorm`; recovery, quantization and layout follow. Numerics: lossy by design; where the
consumers' weights of the removed channels are zero, the result is unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Op

from hone.errors import UsageError
from hone.passes.graph.dataflow import Rebuilder, shape_of, with_args

from .channel_flow import ChannelFlow
from .channel_groups import ChannelGroup, groups_of
from .importance import Norm, channel_importance


class Scope(StrEnum):
    """Where `amount` applies: to each group, or to the network as a whole."""

    GLOBAL = "global"
    LOCAL = "local"


@dataclass(frozen=True, kw_only=True)
class PrunedGroup:
    """What is removed from one group.

    Parameters
    ----------
    layers : tuple of str
        Layer ids of the producers.
    size : int
        Channels before.
    kept : tuple of int
        Channels that stay, ascending.
    """

    layers: tuple[str, ...]
    size: int
    kept: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SkippedGroup:
    """A group that stays whole, and why."""

    layers: tuple[str, ...]
    size: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """What `PruneChannels` would remove, and everything that it leaves alone."""

    pruned: tuple[PrunedGroup, ...]
    skipped: tuple[SkippedGroup, ...]

    @property
    def removed(self) -> int:
        """Channels removed, coupled ones counted once."""
        return sum(group.size - len(group.kept) for group in self.pruned)


@tvm.transform.module_pass(opt_level=0)
class PruneChannels:
    """Remove the channels whose filters have the smallest norm.

    Parameters
    ----------
    amount : float
        Fraction of the channels to remove, in [0, 1): of each group (local), or of all the
        channels that can be removed (global).
    norm : Norm or str
        ``l1`` or ``l2``. See `hone.passes.prune.importance`.
    scope : Scope or str
        ``local``: every group loses the same fraction. ``global``: channels of all groups compete
        by their norm relative to their layer.
    round_to : int
        The number kept is rounded to the nearest multiple of this (halves up), and is at least
        this: a vector width, so that no kernel has a remainder.
    minimum : int
        Least number of channels kept in a group.

    Raises
    ------
    UsageError
        An option is out of range.

    Notes
    -----
    Groups are removed whole: what `hone.passes.prune.channel_groups.find` calls frozen stays, and
    `plan` says why. Ties go to the lower channel.
    """

    def __init__(
        self,
        *,
        amount: float = 0.5,
        norm: Norm | str = Norm.L1,
        scope: Scope | str = Scope.LOCAL,
        round_to: int = 1,
        minimum: int = 1,
    ) -> None:
        if not 0.0 <= amount < 1.0:
            raise UsageError(f"the amount to prune must be in [0, 1), not {amount}")
        for name, value in (("round_to", round_to), ("minimum", minimum)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        self._amount = amount
        self._norm = _choice(Norm, norm, "norm")
        self._scope = _choice(Scope, scope, "scope")
        self._round_to = round_to
        self._minimum = minimum

    def plan(self, module: tvm.IRModule) -> PruningPlan:
        """Return what would be removed from ``main``, and what is skipped and why."""
        return self._plan(ChannelFlow(module["main"]))[0]

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with smaller layers, or the very same one."""
        flow = ChannelFlow(module["main"])
        keep = self._plan(flow)[1]
        if not keep:
            return module
        functions = dict(module.functions_items())
        functions[module.get_global_var("main")] = _shrink(flow, keep)
        return tvm.IRModule(functions, attrs=module.attrs)

    def _plan(self, flow: ChannelFlow) -> tuple[PruningPlan, dict[int, np.ndarray]]:
        groups = groups_of(flow)
        importance = channel_importance(flow, self._norm)
        free = [group for group in groups if group.reason_frozen is None]
        counts = self._counts(free, importance)
        pruned, skipped, keep = [], [], {}
        for group in groups:
            reason = group.reason_frozen
            count = counts.get(group.channels, group.size)
            if reason is None and count == group.size:
                reason = f"{count} of {count} channels stay at this amount, rounding and minimum"
            if reason is not None:
                skipped.append(SkippedGroup(layers=group.producers, size=group.size, reason=reason))
                continue
            # A stable sort of the negated values keeps the lower channel of two equal ones.
            order = np.argsort(-importance[group.channels], kind="stable")
            kept = np.sort(order[:count])
            pruned.append(
                PrunedGroup(
                    layers=group.producers, size=group.size, kept=tuple(int(k) for k in kept)
                )
            )
            keep[group.channels] = np.isin(np.arange(group.size), kept)
        return PruningPlan(pruned=tuple(pruned), skipped=tuple(skipped)), keep

    def _counts(
        self, groups: list[ChannelGroup], importance: dict[int, np.ndarray]
    ) -> dict[int, int]:
        """Return how many channels stay in each group."""
        if self._scope is Scope.LOCAL:
            wanted = {g.channels: g.size - int(self._amount * g.size) for g in groups}
        else:
            wanted = self._global_counts(groups, importance)
        return {group.channels: self._rounded(wanted[group.channels], group) for group in groups}

    def _global_counts(
        self, groups: list[ChannelGroup], importance: dict[int, np.ndarray]
    ) -> dict[int, int]:
        owners = np.repeat(np.arange(len(groups)), [group.size for group in groups])
        # The weakest first; of two equal ones the later channel goes first.
        values = [importance[group.channels] for group in groups]
        order = np.argsort(np.concatenate([*values, np.zeros(0)])[::-1], kind="stable")
        weakest = owners[::-1][order][: int(self._amount * owners.size)]
        lost = np.bincount(weakest, minlength=len(groups))
        return {
            group.channels: group.size - int(count)
            for group, count in zip(groups, lost, strict=True)
        }

    def _rounded(self, count: int, group: ChannelGroup) -> int:
        multiple = max((2 * count + self._round_to) // (2 * self._round_to), 1) * self._round_to
        return min(max(multiple, self._minimum), group.size)


Choice = TypeVar("Choice", Norm, Scope)


def _choice(kind: type[Choice], value: str, name: str) -> Choice:
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(repr(str(member)) for member in kind)
        raise UsageError(f"{name} must be one of {names}, not {value!r}") from None


def _shrink(flow: ChannelFlow, keep: dict[int, np.ndarray]) -> relax.Function:
    """Return the function with only the kept channels of each set."""
    constants: dict[relax.Var, dict[int, np.ndarray]] = {}
    for cut in flow.cuts:
        if not any(flow.root(segment.channels) in keep for segment in cut.segments):
            continue
        operands = constants.setdefault(cut.var, {})
        value = operands.get(cut.argument)
        if value is None:
            value = flow.graph.constant(flow.graph.definition[cut.var].args[cut.argument])
        if value is None:
            raise RuntimeError(f"{cut.var.name}: a weight was constant when it was traced")
        operands[cut.argument] = np.take(value, flow.positions(cut.segments, keep), cut.axis)

    builder = Rebuilder(flow.graph.function)
    for binding in flow.graph.bindings:
        var, call = binding.var, binding.value
        if var not in constants and var not in flow.reshapes:
            builder.copy(binding)
            continue
        arguments = [
            relax.const(constants[var][index])
            if index in constants.get(var, {})
            else builder.use(argument)
            for index, argument in enumerate(call.args)
        ]
        if var in flow.reshapes and call.op.same_as(_RESHAPE):
            track, shape = flow.reshapes[var], list(shape_of(var))
            shape[track.axis] = flow.width(track.segments, keep)
            arguments[1] = relax.ShapeExpr(shape)
        if var in flow.depthwise:
            call = _regrouped(call, flow.width(flow.depthwise[var], keep))
        builder.bind(var, with_args(call, arguments))
    return builder.finish()


def _regrouped(call: relax.Call, groups: int) -> relax.Call:
    """Return a convolution's call with another number of groups; its operands do not matter."""
    make = getattr(relax.op.nn, str(call.op.name).rpartition(".")[2])
    attrs = call.attrs
    return make(
        *call.args,
        strides=attrs.strides,
        padding=attrs.padding,
        dilation=attrs.dilation,
        groups=groups,
        data_layout=attrs.data_layout,
        kernel_layout=attrs.kernel_layout,
        out_layout=attrs.out_layout,
        out_dtype=attrs.out_dtype,
    )


_RESHAPE = Op.get("relax.reshape")
