"""Converts ONNX's Attention to the products and the softmax that it is made of.

What is known at compile time of the keys that a row sees (causality, windows, constant masks) is
one constant; keys are hidden by `where`, so that what they hold does not matter; a value that is no
finite number still spreads, being multiplied with 0. A row that sees no key is zero, as ONNX says.
`hone.passes.lower.fuse_attention` makes one kernel of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper
from tvm.relax import op

from .call import Call, const

_HEADS_BEHIND_ROWS = [0, 2, 1, 3]


@dataclass(frozen=True, kw_only=True)
class _Hidden:
    """Which keys a row does not see; what is left out hides none.

    Parameters
    ----------
    known : ndarray, optional
        bool ``[.., M, S]``, true where a key is seen.
    shown : relax.Expr, optional
        The same, known at run time.
    added : relax.Expr, optional
        Float, is added to the scores; minus infinity hides.
    constant : ndarray, optional
        The value of ``added`` where it is known.
    """

    known: np.ndarray | None
    shown: Any
    added: Any
    constant: np.ndarray | None

    @property
    def seen_at_run_time(self) -> bool:
        """Whether it is only known at run time which rows see a key."""
        return self.shown is not None or (self.added is not None and self.constant is None)


def attention(call: Call) -> Any:
    """``softmax(softcap(scale Q K^T) + mask) V``, and what else is asked for."""
    dtype = call.dtype()
    query, key, value = (_heads(call, index) for index in range(3))
    if call.input(4) is not None:
        key = call.bb.emit(op.concat([call.inputs[4], key], axis=2))
        value = call.bb.emit(op.concat([call.inputs[5], value], axis=2))
    present = [key, value]
    batch, heads, rows, depth = (int(d) for d in query.ty.shape)
    groups, keys = int(key.ty.shape[1]), int(key.ty.shape[2])
    key, value = (_repeated(call, x, heads // groups) for x in present)
    scale = call.attributes.get("scale", 1 / math.sqrt(depth))
    turned = call.bb.emit(op.permute_dims(key, [0, 1, 3, 2]))
    if dtype in ("float32", "float64"):
        scores = op.multiply(call.bb.emit(op.matmul(query, turned)), const(scale, dtype))
    else:
        # As the definition says, so that sums stay small; which has no root of a scale below 0.
        root = math.sqrt(abs(scale))
        left = op.multiply(query, const(math.copysign(root, scale), dtype))
        scores = op.matmul(left, op.multiply(turned, const(root, dtype)))
    steps = [call.bb.emit(scores)]
    cap = call.attributes.get("softcap", 0.0)
    if cap > 0:
        scores = op.multiply(op.tanh(op.divide(steps[-1], const(cap, dtype))), const(cap, dtype))
        steps.append(call.bb.emit(scores))
    capped = steps[-1]
    hidden = _hidden(call, batch, rows, keys)
    masked = _masked(call, capped, hidden)
    seen = _seen(call, hidden)
    precision = call.attributes.get("softmax_precision")
    wide = str(np.dtype(helper.tensor_dtype_to_np_dtype(precision))) if precision else dtype
    shares = op.nn.softmax(masked if wide == dtype else op.astype(masked, wide), axis=-1)
    shares = call.bb.emit(shares if wide == dtype else op.astype(shares, dtype))
    result = call.bb.emit(op.matmul(shares, value))
    is_flat = len(call.shape()) == 3
    if is_flat:
        result = call.bb.emit(op.permute_dims(result, _HEADS_BEHIND_ROWS))
    zero = const(0, dtype)
    if seen is not None:
        own = call.bb.emit(op.permute_dims(seen, _HEADS_BEHIND_ROWS)) if is_flat else seen
        result = call.bb.emit(op.where(own, result, zero))
    if is_flat:
        result = op.reshape(result, call.outputs[0].shape)
    # Without a cap in mode 0, as the text and the function of the definition have it; onnx's
    # reference implementation returns the capped scores there.
    mode = int(call.attributes.get("qk_matmul_output_mode", 0))
    inner = (steps[0], capped, masked, shares)[mode]
    if mode == 3 and seen is not None:
        inner = op.where(seen, shares, zero)
    return [result, *present, inner]


def _heads(call: Call, index: int) -> Any:
    """Return an operand as ``[B, H, rows, D]``."""
    shape = call.shape(index)
    if len(shape) == 4:
        return call.inputs[index]
    heads = int(call.attributes["kv_num_heads" if index else "q_num_heads"])
    split = op.reshape(call.inputs[index], (*shape[:2], heads, shape[2] // heads))
    return call.bb.emit(op.permute_dims(call.bb.emit(split), _HEADS_BEHIND_ROWS))


def _repeated(call: Call, x: Any, times: int) -> Any:
    """Return ``[B, G, S, D]`` with each head so many times."""
    if times == 1:
        return x
    batch, groups, keys, depth = (int(d) for d in x.ty.shape)
    wide = call.bb.emit(op.reshape(x, (batch, groups, 1, keys, depth)))
    wide = call.bb.emit(op.broadcast_to(wide, (batch, groups, times, keys, depth)))
    return call.bb.emit(op.reshape(wide, (batch, groups * times, keys, depth)))


def _both(call: Call, first: Any, second: Any) -> Any:
    """Return where two conditions hold, of which either may be left out."""
    if first is None or second is None:
        return second if first is None else first
    return call.bb.emit(op.logical_and(first, second))


def _hidden(call: Call, batch: int, rows: int, keys: int) -> _Hidden:
    """Return what the mask, causality, windows and unused keys hide."""
    lengths = call.input(6)
    past = int(call.inputs[4].ty.shape[2]) if call.input(4) is not None else 0
    left, right = (int(call.attributes.get(f"{s}_window_size", -1)) for s in ("left", "right"))
    if call.attributes.get("is_causal", 0):
        right = 0 if right < 0 else min(right, 0)
    # How far a key lies behind a row, were the first of each of one sample the same token.
    ahead = np.arange(keys)[None] - np.arange(rows)[:, None]
    known: np.ndarray | None = None
    shown = None
    if lengths is None:
        sides = [ahead - past <= right] * (right >= 0) + [ahead - past >= -left] * (left >= 0)
        known = np.logical_and.reduce(sides) if sides else None
    else:
        lengths = call.bb.emit(op.reshape(op.astype(lengths, "int64"), (batch, 1, 1, 1)))
        offset = call.bb.emit(op.subtract(lengths, const(rows, "int64")))
        distance = call.bb.emit(op.subtract(const(ahead, "int64"), offset))
        shown = call.bb.emit(op.less(const(np.arange(keys).reshape(1, 1, 1, -1), "int64"), lengths))
        if right >= 0:
            side = call.bb.emit(op.less_equal(distance, const(right, "int64")))
            shown = _both(call, shown, side)
        if left >= 0:
            side = call.bb.emit(op.greater_equal(distance, const(-left, "int64")))
            shown = _both(call, shown, side)
    if call.input(3) is None:
        return _Hidden(known=known, shown=shown, added=None, constant=None)
    mask, constant = _mask(call, keys)
    if call.dtype(3) != "bool":
        return _Hidden(known=known, shown=shown, added=mask, constant=constant)
    if constant is not None:
        known = constant if known is None else known & constant
    else:
        shown = _both(call, shown, mask)
    return _Hidden(known=known, shown=shown, added=None, constant=None)


def _mask(call: Call, keys: int) -> tuple[Any, np.ndarray | None]:
    """Return the mask with one element for each key, those that it lacks hidden; and its value.

    Numbers are in the type of the scores, to which they are added.
    """
    shape, value, dtype = call.shape(3), call.value(3), call.dtype(3)
    cast = dtype not in ("bool", call.dtype())
    dtype = call.dtype() if cast else dtype
    hides = False if dtype == "bool" else -np.inf
    missing = keys - shape[-1]
    if value is not None:
        with np.errstate(over="ignore"):
            value = value.astype(dtype)
        ends = [(0, 0)] * (len(shape) - 1) + [(0, missing)]
        value = np.pad(value, ends, constant_values=np.asarray(hides).astype(value.dtype))
        return const(value, dtype), value
    mask = call.inputs[3]
    if cast:
        mask = call.bb.emit(op.astype(mask, dtype))
    if missing:
        rest = const(np.full((*shape[:-1], missing), hides), dtype)
        mask = call.bb.emit(op.concat([mask, rest], axis=-1))
    return mask, None


def _masked(call: Call, scores: Any, hidden: _Hidden) -> Any:
    least = const(-np.inf, call.dtype())
    if hidden.added is not None:
        scores = call.bb.emit(op.add(scores, hidden.added))
    if hidden.known is not None:
        scores = call.bb.emit(op.where(const(hidden.known, "bool"), scores, least))
    if hidden.shown is not None:
        scores = call.bb.emit(op.where(hidden.shown, scores, least))
    return scores


def _seen(call: Call, hidden: _Hidden) -> Any:
    """Return which rows see a key, bool with the axes of the scores; None where all do."""
    dtype = call.dtype()
    known = np.ones((1, 1), bool) if hidden.known is None else hidden.known
    if not hidden.seen_at_run_time:
        if hidden.constant is not None:
            known = known & (hidden.constant.astype(np.float64) > -np.inf)
        rows = np.asarray(known.any(-1, keepdims=True))
        shape = (1,) * (4 - rows.ndim) + rows.shape
        return None if rows.all() else const(rows.reshape(shape), "bool")
    shown = None if known.all() else const(known, "bool")
    shown = _both(call, hidden.shown, shown)
    if hidden.added is not None:
        shown = _both(call, shown, call.bb.emit(op.greater(hidden.added, const(-np.inf, dtype))))
    shape = tuple(int(d) for d in shown.ty.shape)
    number = call.bb.emit(op.sum(op.astype(shown, "float32"), axis=-1, keepdims=True))
    seen = call.bb.emit(op.greater(number, const(0, "float32")))
    return call.bb.emit(op.reshape(seen, (1,) * (4 - len(shape)) + (*shape[:-1], 1)))
