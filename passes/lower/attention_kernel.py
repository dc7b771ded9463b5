"""The computation of attention, ``softmax(Q K^T scale + bias) V``, block of keys by block of keys.

Scores may be covered by others or, where they follow the row's own position, left out. Every block
has its own stages. The maximum, the sum and the result of the rows run along with the
blocks (online softmax, Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022), which one
block does not need. `hone.targets.schedule.attention` puts the stages together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm import te, tirx

from hone.targets.schedule.attention import CAUSAL, TILE
from hone.targets.schedule.tile_model import Tile

from .elementary import exp2_below_0, tanh
from .reductions import MAX, SUM, Reducer, reduce_rows

_LOG2E = math.log2(math.e)
_LEAST = 3.4e38
# The score of a key that is not seen.
_HIDDEN = tirx.const(-math.inf, "float32")


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Which of the heads of ``[B, rows, all heads, D]`` an operand is.

    Parameters
    ----------
    operand : int
        Position among the kernel's arguments.
    first, step : int
        Head h of the operand is head ``first + step h`` of the argument.
    """

    operand: int
    first: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How attention is cut.

    Parameters
    ----------
    tile : Tile
        Register tile of the scores: rows in ``columns``, vectors of keys.
    keys : int
        Of a block; whole tiles.
    count : int
        Blocks of keys; the last one may be shorter.
    channels : int
        Of a value, rounded up to whole vectors.
    lanes : int
        Of one vector.
    """

    tile: Tile
    keys: int
    count: int
    channels: int
    lanes: int


@dataclass(frozen=True, kw_only=True)
class _State:
    """What is known after a block of keys: maximum and sum ``[B, H, M]``, result ``[.., C]``."""

    top: te.Tensor
    total: te.Tensor
    result: te.Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionKernel:
    """Attention of one shape; call it with the operands.

    Parameters
    ----------
    query, key, value : Heads
        Where they are among the operands, ``[B, rows, heads, D]`` each.
    bias, cover : int or None
        Where the bias and the cover ``[B or 1, H or 1, M or 1, S]`` are, float32 and uint8.
    fill : float
        What takes the place of a score whose cover is 0.
    cover_first : bool
        The bias is added to what the cover leaves, rather than covered as well.
    causal : int or None
        Row m sees the keys up to ``m + causal``, which is not negative; others are not even read.
    batch, rows, keys, heads, depth, channels : int
        B, M, S, H of the queries, D, and C of the values.
    shared : int
        Heads of queries that share a head of keys and values.
    scale : float
        Of the products; applied to the keys.
    cap : float or None
        A score is ``cap tanh`` of its product.
    blocks : Blocks
        How rows, keys and channels are cut; each is rounded up.
    """

    query: Heads
    key: Heads
    value: Heads
    bias: int | None
    cover: int | None
    fill: float
    cover_first: bool
    causal: int | None
    batch: int
    rows: int
    keys: int
    heads: int
    depth: int
    channels: int
    shared: int
    scale: float
    cap: float | None
    blocks: Blocks

    @property
    def _base(self) -> float:
        """What turns logarithms to base e into those that the scores are: it joins their factor.

        1 where the least finite number may be added: times log2(e) it is infinite.
        """
        scaled = self.cover is None or math.isinf(self.fill) or abs(self.fill) < _LEAST / _LOG2E
        return _LOG2E if self.bias is None and scaled else 1.0

    def _power(self, difference: tirx.Expr) -> tirx.Expr:
        """Return the power of a difference of scores, which is not above 0."""
        rest = tirx.const(_LOG2E / self._base, "float32")
        return exp2_below_0(difference if self._base == _LOG2E else difference * rest)

    @property
    def _wide(self) -> int:
        return self.blocks.keys * self.blocks.count

    @property
    def _outer(self) -> tuple[int, int, int]:
        tile = self.blocks.tile.columns
        return self.batch, self.heads, -(-self.rows // tile) * tile

    def _row(self, m: tirx.Expr) -> tirx.Expr:
        """Return the row of a query; those beyond the last are the last one again."""
        return m if self._outer[2] == self.rows else tirx.min(m, self.rows - 1)

    def _shared(self, h: tirx.Expr) -> tirx.Expr:
        """Return the head of keys and values that a head of queries reads."""
        return h if self.shared == 1 else tirx.indexdiv(h, self.shared)

    def __call__(self, *operands: te.Tensor) -> te.Tensor:
        """Return ``[B, M, H, C]``."""
        turned = self._turned(operands[self.key.operand])
        values = self._values(operands[self.value.operand])
        bias = cover = None
        if self.bias is not None:
            bias = self._extended(operands[self.bias], _HIDDEN, "attn_bias")
        if self.cover is not None:
            # What lies beyond the last key is hidden behind the cover.
            cover = self._extended(operands[self.cover], tirx.const(1, "uint8"), "attn_cover")
        guarded = bias is not None or cover is not None
        states: list[_State] = []
        for index in range(self.blocks.count):
            scores = self._scores(index, operands[self.query.operand], turned, bias, cover)
            before = states[-1] if states else None
            states.append(self._step(index, scores, values, before, guarded=guarded))
        result = self._mean(states[-1])
        return te.compute(
            (self.batch, self.rows, self.heads, self.channels),
            lambda b, m, h, c: result[b, h, m, c],
            name="attn_out",
        )

    def _turned(self, key: te.Tensor) -> te.Tensor:
        """Return the keys times the scale as ``[B, H, D, S]``; those beyond the last are it."""
        of = self.key
        scale = tirx.const(self.scale if self.cap else self.scale * self._base, "float32")
        heads = self.heads // self.shared

        def element(b: tirx.Expr, h: tirx.Expr, s: tirx.Expr, d: tirx.Expr) -> tirx.Expr:
            row = s if self._wide == self.keys else tirx.min(s, self.keys - 1)
            return key[b, row, h * of.step + of.first, d] * scale

        rows = te.compute((self.batch, heads, self._wide, self.depth), element, name="attn_rows")
        return te.compute(
            (self.batch, heads, self.depth, self._wide),
            lambda b, h, d, s: rows[b, h, s, d],
            name="attn_keys",
        )

    def _values(self, value: te.Tensor) -> Callable[..., tirx.Expr]:
        """Return what reads ``(batch, row, head, channel)`` of the values, in whole vectors.

        Where no vector divides the channels it reads a copy with zeros behind them.
        """
        of, zero = self.value, tirx.const(0.0, "float32")

        def lying(b: tirx.Expr, s: tirx.Expr, h: tirx.Expr, c: tirx.Expr) -> tirx.Expr:
            return value[b, s, h * of.step + of.first, c]

        if self.blocks.channels == self.channels:
            return lying
        copied = te.compute(
            (self.batch, self.keys, self.heads // self.shared, self.blocks.channels),
            lambda b, s, h, c: tirx.if_then_else(c < self.channels, lying(b, s, h, c), zero),
            name="attn_values",
        )
        return lambda *i: copied[i]

    def _extended(self, mask: te.Tensor, beyond: tirx.Expr, name: str) -> te.Tensor:
        """Return a bias or cover with an element for each key beyond the last."""
        if self._wide == self.keys:
            return mask
        return te.compute(
            (*mask.shape[:3], self._wide),
            lambda b, h, m, s: tirx.if_then_else(s < self.keys, mask[b, h, m, s], beyond),
            name=name,
        )

    def _scores(
        self,
        index: int,
        query: te.Tensor,
        turned: te.Tensor,
        bias: te.Tensor | None,
        cover: te.Tensor | None,
    ) -> te.Tensor:
        """Return the scores of a block of keys, minus infinity beyond the last key."""
        first, tile = index * self.blocks.keys, self.blocks.tile
        d = te.reduce_axis((0, self.depth), "d")

        def product(b: tirx.Expr, h: tirx.Expr, m: tirx.Expr, s: tirx.Expr) -> tirx.Expr:
            left = query[b, self._row(m), h * self.query.step + self.query.first, d]
            return te.sum(left * turned[b, self._shared(h), d, first + s], axis=d)

        shape = (*self._outer, self.blocks.keys)
        products = te.compute(shape, product, name=f"attn_products{index}")

        def score(b: tirx.Expr, h: tirx.Expr, m: tirx.Expr, s: tirx.Expr) -> tirx.Expr:
            value = products[b, h, m, s]
            if self.cap is not None:
                value = tanh(value) * tirx.const(self.cap * self._base, "float32")

            def of(mask: te.Tensor) -> tirx.Expr:
                at = (b, h, self._row(m))
                own = [0 if int(n) == 1 else i for i, n in zip(at, mask.shape, strict=False)]
                return mask[(*own, first + s)]

            fill = tirx.const(self.fill * self._base, "float32")
            if cover is not None and self.cover_first:
                value = tirx.Select(of(cover) != 0, value, fill)
            if bias is not None:
                value = value + of(bias)
            if cover is not None and not self.cover_first:
                value = tirx.Select(of(cover) != 0, value, fill)
            if self.causal is not None:
                value = tirx.Select(first + s <= m + self.causal, value, _HIDDEN)
            if bias is not None or first + self.blocks.keys <= self.keys:
                return value
            return tirx.Select(first + s < self.keys, value, _HIDDEN)

        attrs: dict[str, object] = {TILE: [tile.columns, tile.vectors]}
        if self.causal is not None:
            attrs[CAUSAL] = self.causal
        return te.compute(shape, score, name=f"attn_scores{index}", attrs=attrs)

    def _step(
        self,
        index: int,
        scores: te.Tensor,
        value: Callable[..., tirx.Expr],
        before: _State | None,
        *,
        guarded: bool,
    ) -> _State:
        """Return the state after a block of keys.

        ``top = max(top', max s)``, ``p = e^(s - top)``, ``decay = e^(top' - top)``,
        ``total = total' decay + sum p``, ``result = result' decay + p V``. Where a block may be
        masked as a whole (``guarded``), the maximum is not below the least finite number, so that
        its powers are 0.
        """
        outer, wide = self._outer, self.blocks.keys
        first = index * wide
        most = self._reduced(scores, MAX)
        if before is not None:
            top = te.compute(outer, lambda *i: tirx.max(before.top[i], most[i]), name="row_top")
        elif guarded and self.blocks.count > 1:
            least = tirx.min_value("float32")
            top = te.compute(outer, lambda *i: tirx.max(least, most[i]), name="row_top")
        else:
            top = most
        powers = te.compute(
            (*outer, wide), lambda *i: self._power(scores[i] - top[i[:-1]]), name="row_exp"
        )
        total = self._reduced(powers, SUM)
        s = te.reduce_axis((0, min(wide, self.keys - first)), "s")

        def product(b: tirx.Expr, h: tirx.Expr, m: tirx.Expr, c: tirx.Expr) -> tirx.Expr:
            return te.sum(powers[b, h, m, s] * value(b, first + s, self._shared(h), c), axis=s)

        shape = (*outer, self.blocks.channels)
        sums = te.compute(shape, product, name=f"attn_acc{index}")
        if before is None:
            result = te.compute(shape, lambda *i: sums[i], name=f"attn_run{index}")
            return _State(top=top, total=total, result=result)
        decay = te.compute(outer, lambda *i: self._power(before.top[i] - top[i]), name="row_decay")
        return _State(
            top=top,
            total=te.compute(
                outer, lambda *i: before.total[i] * decay[i] + total[i], name="row_sum"
            ),
            result=te.compute(
                shape,
                lambda *i: before.result[i] * decay[i[:-1]] + sums[i],
                name=f"attn_run{index}",
            ),
        )

    def _reduced(self, rows: te.Tensor, reducer: Reducer) -> te.Tensor:
        """Reduce along the keys of a block, whole tiles of scores at a time where some are left."""
        return reduce_rows(
            lambda i, _, s: rows[(*i, s)],
            self._outer,
            self.blocks.keys,
            reducer,
            lanes=self.blocks.lanes,
            together=0 if self.causal is None else self.blocks.tile.vectors,
        )

    def _mean(self, state: _State) -> te.Tensor:
        share = te.compute(
            self._outer, lambda *i: tirx.const(1.0, "float32") / state.total[i], name="row_share"
        )
        return te.compute(
            state.result.shape, lambda *i: state.result[i] * share[i[:-1]], name="attn_mean"
        )
