"""Masks of attention: how exporters hide keys, what is skipped, and what a hidden row gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from tvm import relax, sym, tirx
from tvm.script import tirx as T  # noqa: N812
from tvm_ffi import structural_walk

from hone import pipeline
from hone.errors import ModelError
from hone.passes.lower.attention import choose_blocks
from hone.passes.lower.attention_operator import Attention
from hone.passes.lower.fuse_attention import FuseAttention
from hone.passes.lower.skip_hidden_keys import SkipHiddenKeys
from hone.targets.schedule.boxes import substituted
from hone.targets.schedule.machine import Machine
from hone.targets.target import Target, resolve

MACHINE = Machine.of(resolve("x86-64-v3"), 2)
LEAST = np.finfo(np.float32).min
op = relax.op
Emit = Callable[[relax.Expr], relax.Var]
# ``(scores, further inputs, emit) → what is softmaxed``, and the same in numpy.
Masks = Callable[[relax.Expr, list[relax.Expr], Emit], relax.Expr]
Oracle = Callable[[np.ndarray, list[np.ndarray]], np.ndarray]


def scalar(value: float) -> relax.Expr:
    return relax.const(np.float32(value))


def constant(array: np.ndarray) -> relax.Expr:
    return relax.const(array, str(array.dtype))


@dataclass(frozen=True, kw_only=True)
class Case:
    """Heads of ``[B, H, rows, D]`` and ``[B, G, keys, D]``, and what happens to their scores.

    ``extra`` are further inputs; ``causal`` is what the pass must make of constants.
    """

    id: str
    masks: Masks
    oracle: Oracle
    batch: int = 2
    heads: int = 2
    groups: int = 2
    rows: int = 9
    keys: int = 13
    depth: int = 16
    extra: tuple[np.ndarray, ...] = ()
    causal: int | None = None
    scaled: bool = False

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        wide = (self.batch, self.groups, self.keys, self.depth)
        return [(self.batch, self.heads, self.rows, self.depth), wide, wide]

    def module(self) -> tvm.IRModule:
        builder = relax.BlockBuilder()
        inputs = [
            relax.Var(f"x{i}", relax.TensorType(shape, "float32"))
            for i, shape in enumerate(self.shapes)
        ]
        extra = [
            relax.Var(f"m{i}", relax.TensorType(array.shape, str(array.dtype)))
            for i, array in enumerate(self.extra)
        ]
        emit = builder.emit
        with builder.function("main", [*inputs, *extra]):
            with builder.dataflow():
                query, key, value = inputs
                key, value = (self._repeated(x, emit) for x in (key, value))
                key = emit(op.permute_dims(key, [0, 1, 3, 2]))
                if self.scaled:
                    query, key = (emit(op.multiply(x, scalar(0.5))) for x in (query, key))
                scores = emit(op.matmul(query, key))
                if not self.scaled:
                    scores = emit(op.divide(scores, scalar(4)))
                scores = emit(self.masks(scores, extra, emit))
                shares = emit(op.nn.softmax(scores, axis=-1))
                result = builder.emit_output(op.matmul(shares, value))
            builder.emit_func_output(result)
        return builder.get()

    def _repeated(self, x: relax.Expr, emit: Emit) -> relax.Expr:
        if self.groups == self.heads:
            return x
        batch, groups, keys, depth = self.batch, self.groups, self.keys, self.depth
        wide = emit(op.reshape(x, (batch, groups, 1, keys, depth)))
        shape = (batch, groups, self.heads // groups, keys, depth)
        wide = emit(op.broadcast_to(wide, shape))
        return emit(op.reshape(wide, (batch, self.heads, keys, depth)))

    def expected(self, arrays: list[np.ndarray]) -> np.ndarray:
        query, key, value = (array.astype(np.float64) for array in arrays[:3])
        key, value = (np.repeat(x, self.heads // self.groups, axis=1) for x in (key, value))
        scores = self.oracle(query @ key.swapaxes(-1, -2) / 4, arrays[3:])
        with np.errstate(invalid="ignore"):
            powers = np.exp(scores - scores.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True) @ value


def run(case: Case, target: Target, arrays: list[np.ndarray], machine: Machine) -> np.ndarray:
    module = case.module()
    for stage in (*pipeline.graph_stages(), *pipeline.lower_stages_of(machine)):
        module = stage.run(module)
    scheduled = pipeline.schedule(module, target, threads=2)
    rules = [decision.rule for decision in scheduled.decisions]
    assert rules.count("attention") == 1
    assert "batch_matmul" not in rules
    executable = pipeline.build_executable(scheduled.module, target, threads=2)
    virtual = relax.VirtualMachine(executable, tvm.cpu())
    return virtual["main"](*[tvm.runtime.tensor(a) for a in arrays]).numpy()


def fused(case: Case) -> relax.Call:
    calls: list[relax.Call] = []

    def note(node: object) -> None:
        if isinstance(node, relax.Call) and str(getattr(node.op, "name", "")) == "hone.attention":
            calls.append(node)

    relax.analysis.post_order_visit(FuseAttention(MACHINE)(case.module())["main"], note)
    (call,) = calls
    return call


TRI = np.tri(9, 13, 4, dtype=bool)
RNG = np.random.default_rng(5)
# The first sample sees all keys, the second none.
PADDED = np.stack([np.ones(13, bool), np.zeros(13, bool)]).reshape(2, 1, 1, 13)
ROWS = RNG.random((2, 1, 9, 13)) < 0.6
# The first keys of a sample are padding, as a tokenizer that pads on the left leaves them.
LEFT = np.where(np.arange(13) < 3, LEAST, np.float32(0)).reshape(1, 1, 1, 13)
BIAS = RNG.standard_normal((2, 9, 13)).astype("float32")


def added(scores: np.ndarray, bias: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return scores + bias


def capped(scores: relax.Expr, emit: Emit) -> relax.Expr:
    tanh = emit(op.tanh(emit(op.divide(scores, scalar(3)))))
    return emit(op.multiply(tanh, scalar(3)))


def below(fill: float) -> Oracle:
    return lambda s, _: np.where(TRI, s, fill)


CASES = [
    Case(
        id="where, constant, the keys behind each row",
        masks=lambda s, _m, _e: op.where(constant(TRI), s, scalar(LEAST)),
        oracle=below(-np.inf),
        causal=4,
    ),
    Case(
        id="where, the keys to hide given",
        masks=lambda s, _m, _e: op.where(constant(~TRI[None, None]), scalar(-np.inf), s),
        oracle=below(-np.inf),
        causal=4,
        scaled=True,
    ),
    Case(
        id="a constant triangle is added, four heads share one of keys",
        masks=lambda s, _m, _e: op.add(s, constant(np.where(TRI, 0, LEAST).astype("float32"))),
        oracle=below(-np.inf),
        heads=4,
        groups=1,
        causal=4,
    ),
    Case(
        id="where with a number that a score may reach",
        masks=lambda s, _m, _e: op.where(constant(TRI), s, scalar(-2)),
        oracle=below(-2),
        heads=4,
    ),
    Case(
        id="minus infinity and padded keys",
        masks=lambda s, m, e: op.add(e(op.where(constant(TRI), s, scalar(-np.inf))), m[0]),
        oracle=lambda s, m: np.where(TRI, s, -np.inf) + m[0],
        extra=(LEFT,),
        causal=4,
    ),
    Case(
        id="the least number and padded keys: early rows see what is behind them",
        masks=lambda s, m, e: op.add(e(op.where(constant(TRI), s, scalar(LEAST))), m[0]),
        oracle=lambda s, m: added(np.where(TRI, s, LEAST).astype("float32"), m[0]),
        extra=(np.where(np.arange(13) < 8, LEAST, np.float32(0)).reshape(1, 1, 1, 13),),
    ),
    Case(
        id="keys of a sample hidden by minus infinity: a row that sees none is NaN",
        masks=lambda s, m, _e: op.where(m[0], s, scalar(-np.inf)),
        oracle=lambda s, m: np.where(m[0], s, -np.inf),
        extra=(PADDED,),
    ),
    Case(
        id="keys of a sample hidden by the least number: a row that sees none is the mean",
        masks=lambda s, m, e: op.where(e(op.logical_not(m[0])), scalar(LEAST), s),
        oracle=lambda s, m: np.where(m[0], s, LEAST),
        extra=(PADDED,),
        keys=13,
    ),
    Case(
        id="keys of each row",
        masks=lambda s, m, _e: op.where(m[0], s, scalar(-1e4)),
        oracle=lambda s, m: np.where(m[0], s, -1e4),
        extra=(ROWS,),
    ),
    Case(
        id="a bias that is covered too",
        masks=lambda s, m, e: op.where(m[1], e(op.add(m[0], s)), scalar(-np.inf)),
        oracle=lambda s, m: np.where(m[1], s + m[0], -np.inf),
        extra=(BIAS, np.ones((9, 13), bool) & TRI),
    ),
    Case(
        id="capped, and hidden behind each row and by a mask",
        masks=lambda s, m, e: op.where(
            m[0], e(op.where(constant(TRI), capped(s, e), scalar(-np.inf))), scalar(-np.inf)
        ),
        oracle=lambda s, m: np.where(m[0] & TRI, 3 * np.tanh(s / 3), -np.inf),
        extra=(PADDED,),
        causal=4,
    ),
    Case(
        id="plus infinity: rows that hide a key are NaN",
        masks=lambda s, _m, _e: op.where(constant(TRI), s, scalar(np.inf)),
        oracle=below(np.inf),
    ),
    Case(
        id="a mask that hides nothing",
        masks=lambda s, _m, _e: op.where(constant(np.ones((9, 13), bool)), s, scalar(-np.inf)),
        oracle=lambda s, _: s,
        groups=1,
    ),
]


def arrays_of(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.standard_normal(s).astype("float32") for s in case.shapes] + list(case.extra)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_masked_attention_equals_the_oracle(
    case: Case, target: Target, rng: np.random.Generator
) -> None:
    arrays = arrays_of(case, rng)
    actual = run(case, target, arrays, Machine.of(target, 2))
    np.testing.assert_allclose(actual, case.expected(arrays), rtol=1e-4, atol=2e-5)


def test_a_constant_mask_takes_a_byte_for_each_score() -> None:
    case = replace(CASES[3], masks=lambda s, _m, _e: op.where(constant(ROWS), s, scalar(-np.inf)))
    mask = fused(case).args[3]
    assert str(mask.ty.dtype) == "uint8"
    np.testing.assert_array_equal(mask.value.numpy(), ROWS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_constant_triangle_becomes_a_number(case: Case) -> None:
    call = fused(case)
    assert int(call.attrs["causal"]) == (-1 if case.causal is None else case.causal)
    assert int(call.args[1].ty.shape[2]) == case.groups


def test_nothing_is_left_of_a_mask_that_hides_nothing() -> None:
    assert len(fused(CASES[-1]).args) == 3


def test_a_covered_score_may_be_anything(target: Target, rng: np.random.Generator) -> None:
    case = next(case for case in CASES if case.id == "keys of each row")
    arrays = arrays_of(case, rng)
    arrays[3] = arrays[3].copy()
    arrays[3][..., 5] = False
    exact = case.expected(arrays)
    arrays[1][:, :, 5] = [np.nan if i % 2 else np.inf for i in range(case.depth)]
    actual = run(case, target, arrays, Machine.of(target, 2))
    np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=2e-5)


LONG = replace(
    CASES[0],
    id="long",
    masks=lambda s, _m, _e: op.where(constant(np.tri(150, 203, 53, dtype=bool)), s, scalar(LEAST)),
    oracle=lambda s, _: np.where(np.tri(150, 203, 53, dtype=bool), s, -np.inf),
    batch=1,
    heads=1,
    groups=1,
    rows=150,
    keys=203,
    depth=12,
)


@pytest.mark.parametrize("blocks", [1, 3])
def test_hidden_keys_are_not_read(blocks: int, target: Target, rng: np.random.Generator) -> None:
    machine = Machine.of(target, 2)
    while True:
        found = choose_blocks(machine, rows=150, keys=203, depth=12, channels=12)
        assert found is not None
        if found.count >= blocks:
            break
        machine = replace(machine, l2_bytes=machine.l2_bytes * 7 // 8)
    arrays = arrays_of(LONG, rng)
    arrays[1] *= np.linspace(0, 4, 203, dtype="float32")[:, None]
    exact = LONG.expected(arrays)
    for array in arrays[1:]:
        array[:, :, 140:] = np.nan
    actual = run(LONG, target, arrays, machine)
    # A block of rows reads as far as its last row, to the end of a tile of keys.
    clean = 140 - 53 - found.tile.columns - 1
    clean -= found.tile.vectors * found.lanes
    assert clean > 0
    np.testing.assert_allclose(actual[:, :, :clean], exact[:, :, :clean], rtol=1e-4, atol=2e-5)
    assert np.isnan(actual[:, :, 140 - 53 :]).all()


def rejected(masks: Masks, *extra: np.ndarray) -> Case:
    return Case(id="", masks=masks, oracle=lambda s, _: s, extra=extra)


@pytest.mark.parametrize(
    "case",
    [
        rejected(lambda s, _m, _e: op.where(constant(TRI), s, constant(BIAS[0]))),
        rejected(lambda s, m, _e: op.where(constant(TRI), s, m[0]), BIAS),
        rejected(lambda s, m, _e: op.where(m[0], s, scalar(-1)), np.ones((9, 1), bool)),
        rejected(lambda s, _m, _e: op.where(constant(TRI), op.multiply(s, s), scalar(-1))),
        rejected(
            lambda s, _m, e: op.multiply(e(op.where(constant(TRI), s, scalar(-9))), scalar(2))
        ),
        rejected(
            lambda s, m, e: op.where(m[0], e(op.where(constant(TRI), s, scalar(-9))), scalar(-1)),
            np.ones((9, 13), bool),
        ),
        rejected(
            lambda s, m, e: op.where(
                m[0], e(op.where(constant(TRI), s, scalar(-np.inf))), scalar(-1)
            ),
            np.ones((9, 13), bool),
        ),
        rejected(lambda s, _m, e: capped(capped(s, e), e)),
        rejected(lambda s, _m, e: op.multiply(e(op.tanh(s)), scalar(0))),
    ],
    ids=[
        *("many fills", "other scores", "rows hidden", "no scores", "scaled later", "two covers"),
        *("hidden keys filled later", "capped twice", "capped to 0"),
    ],
)
def test_other_masks_stay_as_they_are(case: Case) -> None:
    before = case.module()
    assert FuseAttention(MACHINE)(before)["main"].same_as(before["main"])


def test_a_causal_attention_is_one_operator() -> None:
    builder = relax.BlockBuilder()
    inputs = [
        relax.Var(f"x{i}", relax.TensorType(shape, "float32"))
        for i, shape in enumerate(CASES[0].shapes)
    ]
    with builder.function("main", inputs):
        with builder.dataflow():
            query, key, value = (builder.emit(op.permute_dims(x, [0, 2, 1, 3])) for x in inputs)
            call = Attention(query=query, key=key, value=value, scale=0.25, causal=4).call()
            rows = builder.emit(call)
            result = builder.emit_output(op.permute_dims(rows, [0, 2, 1, 3]))
        builder.emit_func_output(result)
    tvm.ir.assert_structural_equal(FuseAttention(MACHINE)(CASES[0].module()), builder.get())


@T.prim_func(s_tir=True)
def marked(x: T.Buffer((64,)), y: T.Buffer((24,))):
    for task in T.parallel(6, annotations={"hone.rows": [2, 3]}):
        for m in T.serial(4, annotations={"hone.rows": [4, 6]}):
            for k in T.serial(8, annotations={"hone.keys": [16, 2, 5]}):
                y[task * 4 + m] = y[task * 4 + m] + x[k * 8]


def test_marked_loops_end_where_nothing_is_seen() -> None:
    before = tvm.IRModule({"main": marked.with_attr("global_symbol", "main")})
    after = SkipHiddenKeys()(before)["main"]
    loops: list[tirx.For] = []
    structural_walk(after.body, ((tirx.For, loops.append),))
    by_name = {str(loop.loop_var.name): loop for loop in loops}
    assert all(not loop.annotations for loop in loops)
    analyzer = sym.Analyzer()
    for task, m in ((0, 0), (3, 1), (4, 2), (1, 3)):
        outer = [by_name[name].loop_var for name in ("task", "m")]
        values = [tirx.const(value, "int32") for value in (task, m)]
        extent = substituted(by_name["k"].extent, outer, values)
        first = task % 2 * 3 + m * 6
        assert int(analyzer.simplify(extent)) == min(8, -(-(first + 5) // 16) * 2)


def test_functions_without_marks_stay_the_same() -> None:
    module = SkipHiddenKeys()(tvm.IRModule({"main": marked.with_attr("global_symbol", "main")}))
    tvm.ir.assert_structural_equal(SkipHiddenKeys()(module), module)


def operand(*shape: int, dtype: str = "float32") -> relax.Var:
    return relax.Var("x", relax.TensorType(shape, dtype))


@pytest.mark.parametrize(
    ("key", "bias", "message"),
    [
        (operand(1, 7, 2, 8), None, "queries [1, 5, 3, 8], keys [1, 7, 2, 8] and values"),
        (operand(1, 7, 3, 8, dtype="float16"), None, "operand 1 must be float32, not float16"),
        (operand(7, 3, 8), None, "operand 1 must have four axes"),
        (operand(1, 7, 3, 8), operand(1, 1, 5, 1), "a mask [1, 1, 5, 1] does not fit scores"),
    ],
)
def test_operands_that_do_not_fit_are_refused(
    key: relax.Var, bias: relax.Var | None, message: str
) -> None:
    query = operand(1, 5, 3, 8)
    with pytest.raises(ModelError) as caught:
        Attention(query=query, key=key, value=key, scale=1.0, bias=bias).call()
    assert message in str(caught.value)
