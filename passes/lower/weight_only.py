"""Lowers convolutions and matrix products whose weights are packed levels of few bits.

Makes one kernel of ``hone.decode_weights`` and the ``relax.nn.conv2d`` (NHWC, not grouped),
``relax.matmul`` or ``relax.take`` that reads it: a vector of words is loaded, each of its levels is
cut out by shifts and becomes a float in a register, and no float32 copy of the weights exists.
Levels that follow each other along the sum share a word; words of neighbouring channels share a
vector: ``[ceil(K / tk), words, tk]``. Runs with `LegalizeForCPU`, before fusion. Numerics: the
weights are exactly those that `Decoded.real` returns, up to the order of sums and of the scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from tvm import relax, te, tirx

from hone.passes.quantize.bit_packing import pack_words
from hone.passes.quantize.decode_operator import Decoded, decode_call
from hone.targets.schedule.machine import Machine, choose_tile

from .anchors import ANCHOR, through_layout_change
from .window import Window

Legalization = Callable[[relax.BlockBuilder, relax.Call], relax.Expr]

WORD_BITS = (32, 16, 8)
# From this many rows on, a decoded weight vector serves enough of them to be scaled right away;
# below, sums of a group are scaled instead.
SCALED_ROWS = 4
ONE, SIGN = 0x3F800000, -0x80000000
MANTISSA_BITS, EXPONENT_BIAS = 23, 127


@dataclass(frozen=True, kw_only=True)
class Words:
    """How runs of levels along the sum are cut into words.

    Parameters
    ----------
    bits : int
        Of a level.
    word_bits : int
        Of a word. The widest that wastes the least: a run is filled up to whole words.
    run : int
        Levels of one run: a group of a matrix product, the input channels of a convolution.
    """

    bits: int
    word_bits: int
    run: int

    @classmethod
    def of(cls, *, bits: int, run: int) -> Words:
        """Return the cut of runs of a length."""
        if bits == 8:
            return cls(bits=8, word_bits=8, run=run)
        each = {word: word // bits for word in WORD_BITS}
        best = min(WORD_BITS, key=lambda word: (-(-run // each[word]) * each[word], -word))
        return cls(bits=bits, word_bits=best, run=run)

    @property
    def held(self) -> int:
        """Levels in a word."""
        return self.word_bits // self.bits

    @property
    def rounded(self) -> int:
        """Levels of a run with those that fill its last word."""
        return -(-self.run // self.held) * self.held

    def pack(self, levels: np.ndarray) -> np.ndarray:
        """Pack int8 ``[..., run]`` into signed words ``[..., rounded / held]``."""
        if self.bits == 1:
            # The bit of a word is the sign of the float that it becomes.
            levels = -levels
        packed = pack_words(levels, self.bits, self.word_bits)
        return packed.view(f"int{self.word_bits}")

    def level(self, word: tirx.Expr, at: tirx.Expr) -> tirx.Expr:
        """Return one level of a word as float32.

        Two shifts bring the sign of the level to the top and the level back down; of one bit, the
        shifted sign is put on 1.0.
        """
        if self.bits == 8:
            return tirx.Cast("float32", word)
        word, at = tirx.Cast("int32", word), tirx.Cast("int32", at)
        if self.bits == 1:
            sign = (word << (31 - at)) & tirx.const(SIGN, "int32")
            return tirx.reinterpret("float32", sign | tirx.const(ONE, "int32"))
        top = word << (32 - self.bits - at * self.bits)
        return tirx.Cast("float32", top >> (32 - self.bits))


def scale_value(scale: tirx.Expr) -> tirx.Expr:
    """Return a scale as float32; an int8 one is an exponent of two."""
    if scale.dtype == "float32":
        return scale
    biased = tirx.Cast("int32", scale) + EXPONENT_BIAS
    return tirx.reinterpret("float32", biased << MANTISSA_BITS)


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """The constants of a kernel.

    Parameters
    ----------
    words : numpy.ndarray
        Signed integers ``[ceil(K / tk), ..., tk]``.
    scale : numpy.ndarray
        float32 or int8 ``[ceil(K / tk), G, tk]``.
    zero_point : numpy.ndarray or None
        int8, the shape of ``scale``.
    """

    words: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None

    @classmethod
    def of(cls, decoded: Decoded, words: np.ndarray, tile: int) -> Packed:
        """Tile words ``[K, ...]`` and the scales that belong to them by output channels."""
        levels = decoded.levels
        channels = len(words)
        shape = (channels, levels.scale.shape[1])
        scale = np.broadcast_to(levels.scale, shape)
        if levels.power_of_two:
            scale = np.log2(scale).astype(np.int8)
        zero = levels.zero_point
        return cls(
            words=tiled(words, tile),
            scale=tiled(scale, tile),
            zero_point=None if zero is None else tiled(np.broadcast_to(zero, shape), tile),
        )

    def constants(self) -> list[relax.Constant]:
        """Return them as arguments of a call."""
        arrays = [self.words, self.scale]
        if self.zero_point is not None:
            arrays.append(self.zero_point)
        return [relax.const(array, str(array.dtype)) for array in arrays]


def tiled(values: np.ndarray, tile: int) -> np.ndarray:
    """Return ``[K, ...]`` as ``[ceil(K / tile), ..., tile]`` with zeros in the rounding."""
    channels = len(values)
    rounded = -(-channels // tile) * tile
    padded = np.zeros((rounded, *values.shape[1:]), values.dtype)
    padded[:channels] = values
    blocked = padded.reshape(rounded // tile, tile, *values.shape[1:])
    return np.ascontiguousarray(np.moveaxis(blocked, 1, -1))


def dense(
    data: te.Tensor,
    packed: te.Tensor,
    scale: te.Tensor,
    *zero_point: te.Tensor,
    words: Words,
    channels: int,
    tile_rows: int,
) -> te.Tensor:
    """Return ``[M, C] x packed [ceil(K / tk), G × words, tk]`` as ``[M, K]``.

    Parameters
    ----------
    data : te.Tensor
        float32 ``[M, C]``.
    packed, scale, zero_point : te.Tensor
        See `Packed`.
    words : Words
        A run is a group.
    channels : int
        K.
    tile_rows : int
        As for `hone.passes.lower.dense.dense`.
    """
    rows = int(data.shape[0])
    rounded = -(-rows // tile_rows) * tile_rows
    blocks, groups, tile = (int(extent) for extent in scale.shape)
    run, held = words.rounded, words.held
    data = _filled_runs(data, words, groups)

    def row(m: tirx.Var) -> tirx.Expr:
        return m if rounded == rows else tirx.min(m, rows - 1)

    def level(k: tirx.Var, c: tirx.Expr) -> tirx.Expr:
        """Return the level less its zero point."""
        value = words.level(packed[k // tile, c // held, k % tile], c % held)
        if not zero_point:
            return value
        at = zero_point[0][k // tile, c // run if groups > 1 else 0, k % tile]
        return value - tirx.Cast("float32", at)

    def factor(k: tirx.Var, group: tirx.Expr | int) -> tirx.Expr:
        return scale_value(scale[k // tile, group, k % tile])

    shape = (rounded, blocks * tile)
    if groups == 1:
        c = _steps(run)
        sums = te.compute(
            shape, lambda m, k: te.sum(data[row(m), c] * level(k, c), axis=c), name="wonly_acc"
        )
        return te.compute((rows, channels), lambda m, k: sums[m, k] * factor(k, 0), name="wo_cut")
    if rows >= SCALED_ROWS:
        c = _steps(groups * run)
        sums = te.compute(
            shape,
            lambda m, k: te.sum(data[row(m), c] * (level(k, c) * factor(k, c // run)), axis=c),
            name="wonly_acc",
        )
    else:
        c = _steps(run)
        g = te.reduce_axis((0, groups), "g")
        parts = te.compute(
            (*shape, groups),
            lambda m, k, g: te.sum(data[row(m), g * run + c] * level(k, g * run + c), axis=c),
            name="wgroup_part",
        )
        sums = te.compute(
            shape, lambda m, k: te.sum(parts[m, k, g] * factor(k, g), axis=g), name="wgroup_acc"
        )
    if blocks * tile == channels and rounded == rows:
        return sums
    return te.compute((rows, channels), lambda *i: sums[i], name="wo_cut")


def _steps(extent: int) -> tirx.IterVar:
    """Return the axis of a sum over levels.

    Its 64 bits keep TVM from widening everything that the narrower index takes part in, the
    shifted words included.
    """
    return te.reduce_axis((tirx.const(0, "int64"), tirx.const(extent, "int64")), "c")


def _filled_runs(data: te.Tensor, words: Words, groups: int) -> te.Tensor:
    """Return the rows of a matrix with zeros where runs are filled up to whole words."""
    rows, depth = (int(extent) for extent in data.shape)
    run = words.rounded
    if groups * run == depth:
        return data

    def element(m: tirx.Var, c: tirx.Var) -> tirx.Expr:
        at = c if groups == 1 else tirx.indexdiv(c, run) * words.run + tirx.indexmod(c, run)
        inside = at < depth
        if words.rounded != words.run:
            inside = tirx.all(inside, tirx.indexmod(c, run) < words.run)
        return tirx.if_then_else(inside, data[m, at], tirx.const(0, data.dtype))

    return te.compute((rows, groups * run), element, name="wonly_pad")


def conv2d(
    data: te.Tensor,
    packed: te.Tensor,
    scale: te.Tensor,
    *zero_point: te.Tensor,
    words: Words,
    window: Window,
    channels: int,
    group: int,
    tile_columns: int,
    channels_first: bool,
) -> te.Tensor:
    """Return the convolution of NHWC data with ``packed [ceil(K / tk), R, S, words, tk]``.

    Parameters
    ----------
    data : te.Tensor
        ``[N, H, W, C]``, or ``[N, C, H, W]`` with ``channels_first``.
    packed, scale, zero_point : te.Tensor
        See `Packed`.
    words : Words
        A run is the input channels of one tap.
    window : Window
        Geometry.
    channels : int
        K.
    group : int
        Weights along ``[R, S, C]`` that share a scale.
    tile_columns : int
        As for `hone.passes.lower.conv2d.conv2d`.
    channels_first : bool
        Read NCHW data directly.
    """
    _, taps_h, taps_w, _, tile = (int(extent) for extent in packed.shape)
    blocks, groups, _ = (int(extent) for extent in scale.shape)
    height, width = window.output
    rounded = -(-width // tile_columns) * tile_columns
    needed = (rounded - 1) * window.strides[1] + window.dilation[1] * (taps_w - 1) + 1
    padded = _pad(data, window, words, needed if rounded > width else 0, channels_first)
    depth, held = words.run, words.held
    r = te.reduce_axis((0, taps_h), "r")
    s = te.reduce_axis((0, taps_w), "s")
    c = _steps(words.rounded)

    def group_of() -> tirx.Expr | int:
        if groups == 1:
            return 0
        if depth % group == 0:
            return (r * taps_w + s) * (depth // group) + c // group
        # The levels that fill the last word of a tap are 0, whatever scale they meet.
        return tirx.indexdiv((r * taps_w + s) * depth + tirx.min(c, depth - 1), group)

    def weight(k: tirx.Var) -> tirx.Expr:
        value = words.level(packed[k // tile, r, s, c // held, k % tile], c % held)
        if zero_point:
            value = value - tirx.Cast("float32", zero_point[0][k // tile, group_of(), k % tile])
        return value if groups == 1 else value * factor(k, group_of())

    def factor(k: tirx.Var, at: tirx.Expr | int) -> tirx.Expr:
        return scale_value(scale[k // tile, at, k % tile])

    sums = te.compute(
        (window.shape[0], height, rounded, blocks * tile),
        lambda n, h, w, k: te.sum(
            padded[
                n,
                h * window.strides[0] + r * window.dilation[0],
                w * window.strides[1] + s * window.dilation[1],
                c,
            ]
            * weight(k),
            axis=[r, s, c],
        ),
        name="conv_acc",
    )
    shape = (window.shape[0], height, width, channels)
    if groups == 1:
        return te.compute(shape, lambda *i: sums[i] * factor(i[-1], 0), name="wo_cut")
    if blocks * tile == channels and rounded == width:
        return sums
    return te.compute(shape, lambda *i: sums[i], name="wo_cut")


def _pad(
    data: te.Tensor, window: Window, words: Words, width: int, channels_first: bool
) -> te.Tensor:
    """Return the input of a window with zeros around it and behind its channels."""
    batch, height, in_width, channels = window.shape
    top, left, bottom, right = window.padding
    padded_width = max(width, in_width + left + right)
    shape = (batch, height + top + bottom, padded_width, words.rounded)
    if shape == window.shape and not channels_first:
        return data

    def element(n: tirx.Var, h: tirx.Var, w: tirx.Var, c: tirx.Var) -> tirx.Expr:
        bounds = []
        if top or bottom:
            bounds += [h >= top, h < height + top]
        if padded_width > in_width:
            bounds += [w >= left, w < in_width + left]
        if words.rounded > channels:
            bounds.append(c < channels)
        y, x = h - top, w - left
        value = data[n, c, y, x] if channels_first else data[n, y, x, c]
        if not bounds:
            return value
        return tirx.if_then_else(tirx.all(*bounds), value, tirx.const(0, data.dtype))

    return te.compute(shape, element, name="conv_pad")


def decode(
    packed: te.Tensor, scale: te.Tensor, *zero_point: te.Tensor, decoded: Decoded
) -> te.Tensor:
    """Return the whole weight as float32, for a reader that has no kernel of its own."""
    shape, axis = decoded.shape, decoded.axis

    def element(*i: tirx.Var) -> tirx.Expr:
        at: tirx.Expr = tirx.const(0, "int64")
        for position, extent in enumerate(shape):
            if position != axis:
                at = at * extent + i[position]
        return weight_at(packed, scale, *zero_point, decoded=decoded, k=i[axis], at=at)

    return te.compute(shape, element, name="decoded_weight")


def weight_at(
    packed: te.Tensor,
    scale: te.Tensor,
    *zero_point: te.Tensor,
    decoded: Decoded,
    k: tirx.Expr,
    at: tirx.Expr,
) -> tirx.Expr:
    """Return one weight of the operator's own layout: channel ``k``, place ``at`` along D."""
    levels = decoded.levels
    held = 8 // levels.bits
    at = tirx.Cast("int64", at)  # as wide as TVM makes indices, see `_steps`
    if levels.scale.size == 1:
        where: tuple[tirx.Expr | int, ...] = (0, 0)
    else:
        where = (k, 0 if levels.scale.shape[1] == 1 else tirx.indexdiv(at, levels.group))
    words = Words(bits=levels.bits, word_bits=8, run=1)
    byte = tirx.Cast("int32", packed[k, tirx.indexdiv(at, held)])
    if levels.bits == 8:
        value: tirx.Expr = tirx.Cast("float32", (byte << 24) >> 24)
    else:
        value = words.level(byte, tirx.indexmod(at, held))
    if levels.bits == 1:
        value = tirx.const(0, "float32") - value
    if zero_point:
        value = value - tirx.Cast("float32", zero_point[0][where])
    return value * scale_value(scale[where])


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


def _matmul(
    machine: Machine, bb: relax.BlockBuilder, call: relax.Call, decoded: Decoded
) -> relax.Expr | None:
    shape = [int(extent) for extent in call.args[0].ty.shape]
    if len(shape) < 2 or len(decoded.shape) != 2 or decoded.axis != 1:
        return None
    levels = decoded.levels
    channels, depth = levels.levels.shape
    rows = math.prod(shape[:-1])
    words = Words.of(bits=levels.bits, run=levels.group if levels.scale.shape[1] > 1 else depth)
    model = _machine_for(machine, levels.bits)
    groups = levels.scale.shape[1]
    if groups > 1 and rows < SCALED_ROWS:
        # The sums of a group and the totals are in registers together.
        model = replace(model, accumulators=model.accumulators // 2)
    tile = choose_tile(model, height=1, width=rows, channels=channels, depth=depth, taps=1)
    filled = np.zeros((channels, groups * words.run), np.int8)
    filled[:, :depth] = levels.levels
    if levels.zero_point is not None:
        ends = np.repeat(np.broadcast_to(levels.zero_point, (channels, groups)), words.run, axis=1)
        filled[:, depth:] = ends[:, depth:]
    runs = words.pack(filled.reshape(channels, groups, words.run)).reshape(channels, -1)
    packed = Packed.of(decoded, runs, tile.vectors * machine.lanes)
    data = call.args[0]
    if len(shape) > 2:
        data = bb.emit(relax.op.reshape(data, (rows, depth)))
    product = bb.call_te(
        partial(dense, words=words, channels=channels, tile_rows=tile.columns),
        data,
        *packed.constants(),
        primfunc_name_hint="weight_only_dense",
        primfunc_attrs=ANCHOR,
    )
    if len(shape) > 2:
        product = relax.op.reshape(bb.emit(product), (*shape[:-1], channels))
    return product


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
    axis = call.attrs.axis
    if len(decoded.shape) != 2 or decoded.axis != 0 or axis is None or int(axis) % 2 != 0:
        return None
    if str(call.attrs.mode) != "fast":
        return None
    table = decoded.call()
    rank = len(call.args[1].ty.shape)

    def rows(
        indices: te.Tensor, packed: te.Tensor, scale: te.Tensor, *zero_point: te.Tensor
    ) -> te.Tensor:
        shape = (*indices.shape, decoded.shape[1])
        return te.compute(
            shape,
            lambda *i: weight_at(
                packed, scale, *zero_point, decoded=decoded, k=indices[i[:rank]], at=i[rank]
            ),
            name="decoded_rows",
        )

    return bb.call_te(rows, call.args[1], *table.args, primfunc_name_hint="weight_only_take")
