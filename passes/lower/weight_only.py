"""Lowers convolutions and matrix products whose weights are packed levels of few bits.

Makes one kernel of ``hone.decode_weights`` and the ``relax.nn.conv2d`` (NHWC, not grouped),
``relax.matmul`` or ``relax.take`` that reads it: a vector of words is loaded, each of its levels
becomes a float in a register, and no float32 copy of the weights exists. See `weight_words` for
how, and `weight_only_kernels` for the sums. Runs with `LegalizeForCPU`, before fusion. Numerics:
the weights are exactly those that `Decoded.real` returns, up to the order of sums and of the scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from tvm import relax, te

from hone.passes.quantize.binarize import binarized
from hone.passes.quantize.decode_operator import TABLE_MODES, Decoded, decode_call
from hone.passes.quantize.weight_schemes import WeightLevels
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.tile_model import choose_tile

from . import weight_signs
from .anchors import ANCHOR, through_layout_change
from .weight_only_kernels import SCALED_ROWS, conv2d, dense, scales_sums
from .weight_tables import decode, take
from .weight_words import Packed, Words
from .window import Window

Legalization = Callable[[relax.BlockBuilder, relax.Call], relax.Expr]

# More than any weight takes.
STREAMED_BYTES = 1 << 40


def rules(machine: Machine, plain: dict[str, Legalization]) -> dict[str, Legalization]:
    """Return the rules of the operators that read weights, with packed ones in mind.

    Parameters
    ----------
    machine : Machine
        Decides tiles.
    plain : dict
        Operator → the rule for weights that are not packed; for conv2d, matmul and take.
    """
    own = {"relax.nn.conv2d": _conv2d, "relax.matmul": _matmul, "relax.take": _take}
    return {name: partial(_packed_or, own[name], machine, rule) for name, rule in plain.items()}


def legalize_decode(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize a decoded weight whose reader has no kernel for it; it becomes a constant."""
    return bb.call_te(
        partial(decode, decoded=Decoded.of(call)), *call.args, primfunc_name_hint="decode_weights"
    )


def _packed_or(
    kernel: Callable[[Machine, relax.BlockBuilder, relax.Call, Decoded], relax.Expr | None],
    machine: Machine,
    plain: Legalization,
    bb: relax.BlockBuilder,
    call: relax.Call,
) -> relax.Expr:
    source = call.args[0] if call.op.name == "relax.take" else call.args[1]
    value = bb.lookup_binding(source) if isinstance(source, relax.Var) else source
    decoding = decode_call(value)
    result = None
    if decoding is not None:
        result = kernel(machine, bb, call, Decoded.of(decoding))
    return plain(bb, call) if result is None else result


def _machine_for(machine: Machine, bits: int) -> Machine:
    """Return a machine whose caches hold as many weights of few bits as they really do."""
    return replace(
        machine,
        l1_bytes=machine.l1_bytes * 32 // bits,
        l2_bytes=machine.l2_bytes * 32 // bits,
    )


def _streaming(machine: Machine, groups: int) -> Machine:
    """Return a machine for few rows: no row comes back for a weight, so caches are no limit.

    The sums of a group and the totals are in registers together.
    """
    accumulators = machine.accumulators // 2 if groups > 1 else machine.accumulators
    return replace(machine, l2_bytes=STREAMED_BYTES, accumulators=accumulators)


def _matmul(
    machine: Machine, bb: relax.BlockBuilder, call: relax.Call, decoded: Decoded
) -> relax.Expr | None:
    shape = [int(extent) for extent in call.args[0].ty.shape]
    if len(shape) < 2 or len(decoded.shape) != 2 or decoded.axis != 1:
        return None
    levels = decoded.levels
    channels, depth = levels.levels.shape
    rows = math.prod(shape[:-1])
    signs = _signs_of(bb, call.args[0], levels)
    if signs is not None:
        tile = choose_tile(
            machine, height=1, width=rows, channels=channels, depth=-(-depth // 32), taps=1
        )
        packed = Packed.of(
            decoded, weight_signs.pack_signs(levels.levels), tile.vectors * machine.lanes
        )
        return _flat(
            bb,
            signs,
            channels,
            partial(weight_signs.dense, channels=channels, tile_rows=tile.columns),
            packed,
            "binary_dense",
        )
    groups = levels.scale.shape[1]
    words = Words.of(
        bits=levels.bits,
        run=levels.group if groups > 1 else depth,
        fields=scales_sums(rows, groups),
    )
    if rows < SCALED_ROWS:
        model = _streaming(machine, groups)
    else:
        model = _machine_for(machine, levels.bits)
    tile = choose_tile(model, height=1, width=rows, channels=channels, depth=depth, taps=1)
    filled = np.zeros((channels, groups * words.run), np.int8)
    filled[:, :depth] = levels.levels
    if levels.zero_point is not None:
        ends = np.repeat(np.broadcast_to(levels.zero_point, (channels, groups)), words.run, axis=1)
        filled[:, depth:] = ends[:, depth:]
    runs = words.pack(filled.reshape(channels, groups, words.run)).reshape(channels, -1)
    packed = Packed.of(decoded, runs, tile.vectors * machine.lanes)
    kernel = partial(dense, words=words, channels=channels, tile_rows=tile.columns)
    return _flat(bb, call.args[0], channels, kernel, packed, "weight_only_dense")


def _flat(
    bb: relax.BlockBuilder,
    data: relax.Expr,
    channels: int,
    kernel: Callable[..., te.Tensor],
    packed: Packed,
    name: str,
) -> relax.Expr:
    """Call a kernel of a matrix with data of any rank."""
    *outer, depth = (int(extent) for extent in data.ty.shape)
    if len(outer) > 1:
        data = bb.emit(relax.op.reshape(data, (math.prod(outer), depth)))
    product = bb.call_te(
        kernel, data, *packed.constants(), primfunc_name_hint=name, primfunc_attrs=ANCHOR
    )
    return relax.op.reshape(bb.emit(product), (*outer, channels)) if len(outer) > 1 else product


def _signs_of(bb: relax.BlockBuilder, data: relax.Expr, levels: WeightLevels) -> relax.Expr | None:
    """Return what a layer reads the signs of, where its weights are signs too."""
    if not isinstance(data, relax.Var) or not weight_signs.fits(levels):
        return None
    value = bb.lookup_binding(data)
    return None if value is None else binarized(value)


def _conv2d(
    machine: Machine, bb: relax.BlockBuilder, call: relax.Call, decoded: Decoded
) -> relax.Expr | None:
    attrs, data = call.attrs, call.args[0]
    fits = (
        attrs.data_layout == "NHWC"
        and attrs.kernel_layout == "OHWI"
        and attrs.out_layout in ("", "NHWC")
        and int(attrs.groups) == 1
        and decoded.axis == 0
        and str(call.ty.dtype) == "float32"
    )
    if not fits:
        return None
    levels = decoded.levels
    channels, taps_h, taps_w, depth = decoded.shape
    window = Window.of(data, (taps_h, taps_w), attrs)
    height, width = window.output
    tile = choose_tile(
        _machine_for(machine, levels.bits),
        height=height,
        width=width,
        channels=channels,
        depth=depth,
        taps=taps_h * taps_w,
    )
    signs = _signs_of(bb, data, levels)
    if signs is not None and not any(window.padding):
        weights = levels.levels.reshape(channels, taps_h, taps_w, depth)
        packed = Packed.of(decoded, weight_signs.pack_signs(weights), tile.vectors * machine.lanes)
        return bb.call_te(
            partial(
                weight_signs.conv2d, window=window, channels=channels, tile_columns=tile.columns
            ),
            signs,
            *packed.constants(),
            primfunc_name_hint="binary_conv2d",
            primfunc_attrs=ANCHOR,
        )
    words = Words.of(bits=levels.bits, run=depth)
    runs = words.pack(levels.levels.reshape(channels, taps_h, taps_w, depth))
    packed = Packed.of(decoded, runs, tile.vectors * machine.lanes)
    data, channels_first = through_layout_change(bb, data)
    return bb.call_te(
        partial(
            conv2d,
            words=words,
            window=window,
            channels=channels,
            group=levels.group,
            tile_columns=tile.columns,
            channels_first=channels_first,
        ),
        data,
        *packed.constants(),
        primfunc_name_hint="weight_only_conv2d",
        primfunc_attrs=ANCHOR,
    )


def _take(
    _machine: Machine, bb: relax.BlockBuilder, call: relax.Call, decoded: Decoded
) -> relax.Expr | None:
    axis, mode = call.attrs.axis, str(call.attrs.mode)
    if len(decoded.shape) != 2 or decoded.axis != 0 or axis is None or int(axis) % 2 != 0:
        return None
    if mode not in TABLE_MODES:
        return None
    table = decoded.call()
    return bb.call_te(
        partial(take, decoded=decoded, mode=mode),
        call.args[1],
        *table.args,
        primfunc_name_hint="weight_only_take",
    )
