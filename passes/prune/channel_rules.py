"""How each operator carries channels from its inputs to its output.

A rule takes the flow, the binding's variable and its call, and returns the output's track, or
None where no channels are followed beyond it. An operator without a rule freezes what it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

from tvm import relax
from tvm.ir import Op

from hone.passes.graph.dataflow import shape_of, variables

from .channel_flow import Role, Segment, Track

if TYPE_CHECKING:
    from .channel_flow import ChannelFlow

Rule = Callable[["ChannelFlow", relax.Var, relax.Call], Track | None]


def follow(flow: ChannelFlow, var: relax.Var, value: relax.Expr) -> Track | None:
    """Return the track of a binding's result."""
    if isinstance(value, relax.Var):
        return flow.track(value)
    if (
        isinstance(value, relax.TupleGetItem)
        and flow.graph.call(value.tuple_value, _BATCH_NORM) is not None
    ):
        track = flow.track(value.tuple_value)
        if value.index == 0:
            return track
        flow.freeze(track, f"the statistics of {flow.where(var)!r} are read")
        return None
    if isinstance(value, relax.Call) and value.op in _RULES:
        return _RULES[value.op](flow, var, value)
    if not isinstance(value, relax.Tuple):
        op = str(value.op.name) if isinstance(value, relax.Call) else "a tuple's element"
        for source in variables(value):
            _freeze_at(flow, source, var, f"{op} is not followed")
    return None


def _freeze_at(flow: ChannelFlow, source: relax.Expr, var: relax.Var, what: str) -> None:
    flow.freeze(flow.track(source), f"the channels reach {flow.where(var)!r}: {what}")


def _pointwise(flow: ChannelFlow, _var: relax.Var, call: relax.Call) -> Track | None:
    return flow.track(call.args[0])


def _elementwise(flow: ChannelFlow, var: relax.Var, call: relax.Call) -> Track | None:
    """Broadcasting operators: channels at the same position from the right are united."""
    rank = len(shape_of(var))
    result: Track | None = None
    for operand in call.args:
        track = flow.track(operand)
        if track is None:
            continue
        axis = track.axis + rank - len(shape_of(operand))
        if flow.extent(operand, track.axis) != flow.extent(var, axis):
            _freeze_at(flow, operand, var, "they are broadcast")
        elif result is None:
            result = Track(axis=axis, segments=track.segments)
        elif result.axis == axis:
            result = flow.unite(result, track, flow.where(var))
        else:
            _freeze_at(flow, operand, var, "they meet channels along another axis")
            flow.freeze(result, f"the channels reach {flow.where(var)!r}: they meet another axis")
    if result is None:
        return None
    for index, operand in enumerate(call.args):
        track = flow.track(operand)
        shape = shape_of(operand)
        axis = result.axis - (rank - len(shape))
        if axis < 0 or shape[axis] == 1 or (track is not None and track.axis == axis):
            continue
        if flow.graph.constant(operand) is None:
            flow.freeze(
                result,
                f"the channels reach {flow.where(var)!r}: they meet a tensor of unknown channels",
            )
        else:
            flow.cut(var, index, axis, result.segments, Role.COUPLED)
    return result


def _convolution(flow: ChannelFlow, var: relax.Var, call: relax.Call) -> Track | None:
    data, weight = call.args
    layouts = [str(call.attrs.data_layout), str(call.attrs.kernel_layout)]
    ranks = [len(shape_of(data)), len(shape_of(weight))]
    constant = flow.graph.constant(weight)
    if constant is None or [len(layout) for layout in layouts] != ranks:
        for operand in (data, weight):
            _freeze_at(flow, operand, var, "its weight is not a plain constant")
        return None
    groups = int(call.attrs.groups)
    inputs, channels = layouts[1].index("I"), constant.shape[layouts[1].index("O")]
    out_axis = (str(call.attrs.out_layout) or layouts[0]).index("C")
    track = _along(flow, data, layouts[0].index("C"), var)
    if groups == 1:
        if track is not None:
            flow.cut(var, 1, inputs, track.segments, Role.CONSUMER)
        return _produce(flow, var, layouts[1].index("O"), out_axis, flow.new(channels))
    if call.op in _TRANSPOSED or groups != shape_of(data)[layouts[0].index("C")]:
        reason = f"{flow.where(var)!r} is a convolution of {groups} groups"
        flow.freeze(track, f"the channels reach {flow.where(var)!r}: it has {groups} groups")
        segment = flow.opaque(shape_of(var)[out_axis], reason)
        return _produce(flow, var, layouts[1].index("O"), out_axis, segment)
    if track is None:
        reason = f"{flow.where(var)!r} is depthwise over channels that are not followed"
        segment = flow.opaque(channels, reason)
        return _produce(flow, var, layouts[1].index("O"), out_axis, segment)
    multiplier = channels // groups
    segments = tuple(
        Segment(channels=segment.channels, repeat=segment.repeat * multiplier)
        for segment in track.segments
    )
    flow.cut(var, 1, layouts[1].index("O"), segments, Role.FILTER)
    flow.depthwise[var] = track.segments
    return Track(axis=out_axis, segments=segments)


def _matmul(flow: ChannelFlow, var: relax.Var, call: relax.Call) -> Track | None:
    data, weight = call.args
    constant = flow.graph.constant(weight)
    if constant is None or constant.ndim != 2:
        for operand in (data, weight):
            _freeze_at(flow, operand, var, "it has no constant weight of two axes")
        return None
    track = _along(flow, data, len(shape_of(data)) - 1, var)
    if track is not None:
        flow.cut(var, 1, 0, track.segments, Role.CONSUMER)
    return _produce(flow, var, 1, len(shape_of(var)) - 1, flow.new(constant.shape[1]))


def _along(flow: ChannelFlow, data: relax.Expr, axis: int, var: relax.Var) -> Track | None:
    """Return the track of `data` if it is along `axis`, else freeze it."""
    track = flow.track(data)
    if track is not None and track.axis != axis:
        _freeze_at(flow, data, var, "it reads them along another axis")
        return None
    return track


def _produce(
    flow: ChannelFlow, var: relax.Var, weight_axis: int, axis: int, segment: Segment
) -> Track:
    flow.cut(var, 1, weight_axis, (segment,), Role.PRODUCER)
    return Track(axis=axis, segments=(segment,))


def _batch_norm(flow: ChannelFlow, var: relax.Var, call: relax.Call) -> Track | None:
    data = call.args[0]
    track = _along(flow, data, int(call.attrs.axis) % len(shape_of(data)), var)
    if track is None:
        return None
    if any(flow.graph.constant(argument) is None for argument in call.args[1:]):
        _freeze_at(flow, data, var, "its statistics are not constant")
        return None
    for index in range(1, 5):
        flow.cut(var, index, 0, track.segments, Role.COUPLED)
    return track


def _prelu(flow: ChannelFlow, var: relax.Var, call: relax.Call) -> Track | None:
    track = _along(flow, call.args[0], int(call.attrs.axis) % len(shape_of(var)), var)
    if track is not None and shape_of(call.args[1])[0] != 1:
        if flow.graph.constant(call.args[1]) is None:
            _freeze_at(flow, call.args[0], var, "its slope is not constant")
        else:
            flow.cut(var, 1, 0, track.segments, Role.COUPLED)
    return track


def _spatial(flow: ChannelFlow, var: relax.Var, call: relax.Call) -> Track | None:
    """Pooling and resizing: what is named C in the layout goes through."""
    layout = str(call.attrs.layout)
    out_layout = str(call.attrs.out_layout) if hasattr(call.attrs, "out_layout") else layout
    if len(layout) != len(shape_of(call.args[0])):
        _freeze_at(flow, call.args[0], var, f"its layout is {layout}")
        return None
    track = _along(flow, call.args[0], layout.index("C"), var)
    return track and Track(axis=(out_layout or layout).index("C"), segments=track.segments)


def _reduction(flow: ChannelFlow, var: relax.Var, call: relax.Call) -> Track | None:
    track = flow.track(call.args[0])
    if track is None:
        return None
    rank = len(shape_of(call.args[0]))
    axes = call.attrs.axis
    reduced = set(range(rank)) if axes is None else {int(axis) % rank for axis in axes}
    if track.axis in reduced:
        _freeze_at(flow, call.args[0], var, "it reduces over them")
        return None
    gone = 0 if call.attrs.keepdims else sum(axis < track.axis for axis in reduced)
    return Track(axis=track.axis - gone, segments=track.segments)


def _normalizing(flow: ChannelFlow, var: relax.Var, call: relax.Call) -> Track | None:
    """Softmax and layer norm: their axes must not be the followed one."""
    track = flow.track(call.args[0])
    rank = len(shape_of(call.args[0]))
    axes = call.attrs.axes if hasattr(call.attrs, "axes") else [call.attrs.axis]
    if track is not None and track.axis in {int(axis) % rank for axis in axes}:
        _freeze_at(flow, call.args[0], var, "it normalizes over them")
        return None
    return track


def _concat(flow: ChannelFlow, var: relax.Var, call: relax.Call) -> Track | None:
    fields = flow.graph.resolve(call.args[0])
    if not isinstance(fields, relax.Tuple):
        for source in variables(call):
            _freeze_at(flow, source, var, "it takes a tuple that is not written out")
        return None
    rank = len(shape_of(var))
    axis = 0 if call.attrs.axis is None else int(call.attrs.axis) % rank
    tracks = [flow.track(field) for field in fields.fields]
    if any(track is not None and track.axis != axis for track in tracks):
        for field in fields.fields:
            _freeze_at(flow, field, var, "it concatenates along another axis")
        return None
    if not any(tracks):
        return None
    segments: list[Segment] = []
    for field, track in zip(fields.fields, tracks, strict=True):
        unknown = f"the channels are concatenated unchanged in {flow.where(var)!r}"
        segments += track.segments if track else [flow.opaque(shape_of(field)[axis], unknown)]
    return Track(axis=axis, segments=tuple(segments))


def _reshape(flow: ChannelFlow, var: relax.Var, call: relax.Call) -> Track | None:
    """Follow channels through a reshape that keeps them whole or merges axes behind them."""
    track = flow.track(call.args[0])
    if track is None:
        return None
    old, new = shape_of(call.args[0]), shape_of(var)
    before = prod(old[: track.axis])
    for axis, extent in enumerate(new):
        if prod(new[:axis]) != before or extent == 1:
            continue
        for stop in range(track.axis + 1, len(old) + 1):
            merged = prod(old[track.axis + 1 : stop])
            if old[track.axis] * merged == extent:
                segments = tuple(
                    Segment(channels=segment.channels, repeat=segment.repeat * merged)
                    for segment in track.segments
                )
                result = Track(axis=axis, segments=segments)
                flow.reshapes[var] = result
                return result
        break
    _freeze_at(flow, call.args[0], var, f"it splits or moves them, {list(old)} → {list(new)}")
    return None


def _permute(flow: ChannelFlow, _var: relax.Var, call: relax.Call) -> Track | None:
    track = flow.track(call.args[0])
    if track is None:
        return None
    rank = len(shape_of(call.args[0]))
    axes = call.attrs.axes
    order = [*range(rank)][::-1] if axes is None else [int(axis) % rank for axis in axes]
    return Track(axis=order.index(track.axis), segments=track.segments)


def _squeeze(flow: ChannelFlow, var: relax.Var, call: relax.Call) -> Track | None:
    track = flow.track(call.args[0])
    if track is None:
        return None
    shape = shape_of(call.args[0])
    axes = call.attrs.axis
    ones = [axis for axis, extent in enumerate(shape) if extent == 1]
    gone = ones if axes is None else [int(axis) % len(shape) for axis in axes]
    if track.axis in gone:
        _freeze_at(flow, call.args[0], var, "it removes their axis")
        return None
    axis = track.axis - sum(other < track.axis for other in gone)
    return Track(axis=axis, segments=track.segments)


def _expand_dims(flow: ChannelFlow, var: relax.Var, call: relax.Call) -> Track | None:
    track = flow.track(call.args[0])
    if track is None:
        return None
    rank = len(shape_of(var))
    inserted = {int(axis) % rank for axis in call.attrs.axis}
    kept = [axis for axis in range(rank) if axis not in inserted]
    return Track(axis=kept[track.axis], segments=track.segments)


def _pad(flow: ChannelFlow, var: relax.Var, call: relax.Call) -> Track | None:
    track = flow.track(call.args[0])
    if track is not None and flow.extent(var, track.axis) != flow.extent(call.args[0], track.axis):
        _freeze_at(flow, call.args[0], var, "it pads them")
        return None
    return track


def _ops(*names: str) -> tuple[Op, ...]:
    return tuple(Op.get(f"relax.{name}") for name in names)


_BATCH_NORM = Op.get("relax.nn.batch_norm")
_TRANSPOSED = _ops(*(f"nn.conv{n}d_transpose" for n in (1, 2, 3)))

_RULES: dict[Op, Rule] = {
    **dict.fromkeys(
        _ops(
            *("abs", "astype", "ceil", "clip", "cos", "erf", "exp", "floor", "log", "negative"),
            *("round", "rsqrt", "sigmoid", "sign", "sin", "sqrt", "square", "tanh", "trunc"),
            *("nn.gelu", "nn.gelu_tanh", "nn.leakyrelu", "nn.relu", "nn.selu", "nn.silu"),
            *("nn.softplus",),
        ),
        _pointwise,
    ),
    **dict.fromkeys(
        _ops(
            *("add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "where"),
            *("equal", "not_equal", "less", "less_equal", "greater", "greater_equal"),
        ),
        _elementwise,
    ),
    **dict.fromkeys(_ops(*(f"nn.conv{n}d" for n in (1, 2, 3))), _convolution),
    **dict.fromkeys(_TRANSPOSED, _convolution),
    **dict.fromkeys(
        _ops(
            *(f"nn.max_pool{n}d" for n in (1, 2, 3)),
            *(f"nn.avg_pool{n}d" for n in (1, 2, 3)),
            *(f"nn.adaptive_avg_pool{n}d" for n in (1, 2, 3)),
            "image.resize2d",
        ),
        _spatial,
    ),
    **dict.fromkeys(_ops("mean", "sum", "max", "min", "prod", "variance", "std"), _reduction),
    **dict.fromkeys(
        _ops("nn.softmax", "nn.log_softmax", "nn.layer_norm", "nn.rms_norm"), _normalizing
    ),
    **dict.fromkeys(_ops("reshape", "nn.batch_flatten"), _reshape),
    _BATCH_NORM: _batch_norm,
    **dict.fromkeys(_ops("matmul"), _matmul),
    **dict.fromkeys(_ops("nn.prelu"), _prelu),
    **dict.fromkeys(_ops("concat"), _concat),
    **dict.fromkeys(_ops("permute_dims"), _permute),
    **dict.fromkeys(_ops("squeeze"), _squeeze),
    **dict.fromkeys(_ops("expand_dims"), _expand_dims),
    **dict.fromkeys(_ops("nn.pad"), _pad),
}
