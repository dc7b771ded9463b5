"""Attention: what is found, what is left alone, and what the kernel computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from tvm import relax

from hone import pipeline
from hone.passes.lower.attention import choose_blocks
from hone.passes.lower.attention_operator import Attention
from hone.passes.lower.fuse_attention import FuseAttention
from hone.targets.schedule.machine import Machine
from hone.targets.target import Target, resolve

MACHINE = Machine.of(resolve("x86-64-v3"), 2)
op = relax.op


@dataclass(frozen=True, kw_only=True)
class Case:
    """An attention of ``[B, rows, H D]``; every field is a way in which exporters differ."""

    id: str
    batch: int = 2
    heads: int = 3
    rows: int = 5
    keys: int = 7
    depth: int = 16
    bias: tuple[int, ...] | None = None
    packed: bool = False
    flat: bool = False
    permuted: bool = True
    scale: str = "divide"
    order: str = "scale first"
    axis: int = -1
    reuse: str = ""

    @property
    def inputs(self) -> list[tuple[int, ...]]:
        width = self.heads * self.depth
        shapes = [(self.batch, self.rows, 3 * width)]
        if not self.packed:
            long = (self.batch, self.keys, width)
            shapes = [(self.batch, self.rows, width), long, long]
        return shapes if self.bias is None else [*shapes, self.bias]

    def graph(self, *inputs: relax.Expr, emit: Callable[[relax.Expr], relax.Var]) -> relax.Expr:
        batch, heads, depth = self.batch, self.heads, self.depth
        if self.packed:
            split = emit(op.reshape(inputs[0], (batch, self.rows, 3, heads, depth)))
            parts = emit(op.split(emit(op.permute_dims(split, [2, 0, 3, 1, 4])), 3, axis=0))
            query, key, value = (
                emit(op.reshape(emit(relax.TupleGetItem(parts, i)), (batch, heads, -1, depth)))
                for i in range(3)
            )
        else:
            query, key, value = (
                emit(op.permute_dims(emit(op.reshape(x, (batch, -1, heads, depth))), [0, 2, 1, 3]))
                for x in inputs[:3]
            )
        if self.flat:
            query, key, value = (
                emit(op.reshape(x, (batch * heads, -1, depth))) for x in (query, key, value)
            )
        axes = [0, 2, 1] if self.flat else [0, 1, 3, 2]
        scores = emit(op.matmul(query, emit(op.permute_dims(key, axes))))
        steps = ["scale", "bias"] if self.order == "scale first" else ["bias", "scale"]
        for step in steps:
            if step == "bias" and self.bias is not None:
                scores = emit(op.add(inputs[-1], scores))
            elif step == "scale" and self.scale == "divide":
                scores = emit(op.divide(scores, relax.const(np.float32(4.0))))
            elif step == "scale" and self.scale == "multiply":
                scores = emit(op.multiply(relax.const(np.float32(0.25)), scores))
            elif step == "scale" and self.scale == "by row":
                rows = np.full((self.rows, 1), 0.25, "float32")
                scores = emit(op.multiply(scores, relax.const(rows)))
        shares = emit(op.nn.softmax(scores, axis=self.axis))
        result = emit(op.matmul(shares, value))
        if self.permuted and not self.flat:
            result = emit(op.permute_dims(result, [0, 2, 1, 3]))
            result = emit(op.reshape(result, (batch, self.rows, heads * depth)))
        if self.reuse:
            other = emit(op.sum({"scores": scores, "shares": shares}[self.reuse]))
            result = emit(op.add(result, other))
        return result

    def oracle(self, arrays: list[np.ndarray]) -> np.ndarray:
        wide = [array.astype("float64") for array in arrays]
        if self.packed:
            parts = wide[0].reshape(self.batch, self.rows, 3, self.heads, self.depth)
            query, key, value = parts.transpose(2, 0, 3, 1, 4)
        else:
            query, key, value = (
                x.reshape(self.batch, -1, self.heads, self.depth).transpose(0, 2, 1, 3)
                for x in wide[:3]
            )
        scores = query @ key.swapaxes(-1, -2) * 0.25
        if self.bias is not None:
            scores = scores + wide[-1]
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        result = powers / powers.sum(-1, keepdims=True) @ value
        if self.flat:
            return result.reshape(-1, self.rows, self.depth)
        if not self.permuted:
            return result
        return result.transpose(0, 2, 1, 3).reshape(self.batch, self.rows, -1)


def module_of(case: Case) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    inputs = [
        relax.Var(f"x{i}", relax.TensorType(shape, "float32"))
        for i, shape in enumerate(case.inputs)
    ]
    with builder.function("main", inputs):
        with builder.dataflow():
            result = builder.emit_output(case.graph(*inputs, emit=builder.emit))
        builder.emit_func_output(result)
    return builder.get()


FUSED = [
    Case(id="odd rows and keys, two of a batch"),
    Case(id="one row, one key", batch=1, heads=1, rows=1, keys=1),
    Case(id="whole tiles", batch=1, heads=4, rows=28, keys=64, depth=64),
    Case(id="several tiles of each", batch=1, heads=1, rows=67, keys=131, depth=32),
    Case(id="queries, keys and values packed", packed=True, rows=37, keys=37),
    Case(id="packed, heads left in front", packed=True, rows=9, keys=9, permuted=False),
    Case(id="batch and heads as one axis", flat=True, rows=13, keys=11),
    Case(id="depth that no vector divides", depth=10),
    Case(id="depth of two vectors and a half", rows=17, keys=19, depth=40),
    Case(id="odd depth", batch=1, rows=6, keys=33, depth=33),
    Case(id="bias of each row of each head", bias=(2, 3, 5, 7)),
    Case(id="bias of the keys of a sample", bias=(2, 1, 1, 7), scale="multiply"),
    Case(id="bias of two axes", bias=(5, 7), keys=7, scale="none"),
    Case(id="bias, whole vectors", bias=(1, 1, 6, 32), rows=6, keys=32),
]


@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.id)
def test_attention_equals_the_oracle(case: Case, target: object, rng: np.random.Generator) -> None:
    arrays = [rng.standard_normal(shape).astype("float32") for shape in case.inputs]
    lowered = pipeline.lower(module_of(case), target, threads=2)
    scheduled = pipeline.schedule(lowered, target, threads=2)
    rules = [decision.rule for decision in scheduled.decisions]
    assert rules.count("attention") == 1
    assert "batch_matmul" not in rules
    executable = pipeline.build_executable(scheduled.module, target, threads=2)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    actual = machine["main"](*[tvm.runtime.tensor(a) for a in arrays]).numpy()
    exact = case.oracle(arrays) if case.scale != "none" else oracle_without_scale(case, arrays)
    # Scores of up to 30 are rounded to 2**-20, and the shares are off by as much of themselves.
    np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=2e-5)


def oracle_without_scale(case: Case, arrays: list[np.ndarray]) -> np.ndarray:
    return case.oracle([arrays[0] * 4, *arrays[1:]])


REJECTED = [
    Case(id="softmax along another axis", axis=2),
    Case(id="scores used again", reuse="scores"),
    Case(id="shares used again", reuse="shares"),
    Case(id="scaled after the bias", bias=(5, 7), order="bias first"),
    Case(id="scaled row by row", scale="by row"),
]


@pytest.mark.parametrize("case", REJECTED, ids=lambda case: case.id)
def test_what_is_no_plain_attention_stays_as_it_is(case: Case) -> None:
    before = module_of(case)
    assert FuseAttention(MACHINE)(before)["main"].same_as(before["main"])


MASKED = Case(id="masked", batch=2, heads=2, rows=17, keys=203, depth=12, bias=(2, 1, 17, 203))


def small(target: Target, blocks: int, case: Case) -> Machine:
    """Return the machine with an L2 in which the keys of a case take so many blocks."""
    machine = Machine.of(target, 2)
    for l2_bytes in range(1 << 17, 256, -64):
        candidate = replace(machine, l2_bytes=l2_bytes)
        found = choose_blocks(
            candidate, rows=case.rows, keys=case.keys, depth=case.depth, channels=case.depth
        )
        if found is not None and found.count == blocks:
            return candidate
    raise AssertionError(f"no cache gives {blocks} blocks")


def run_on(machine: Machine, case: Case, target: Target, arrays: list[np.ndarray]) -> np.ndarray:
    module = module_of(case)
    for stage in (*pipeline.graph_stages(), *pipeline.lower_stages_of(machine)):
        module = stage.run(module)
    scheduled = pipeline.schedule(module, target, threads=2)
    assert [d.rule for d in scheduled.decisions].count("attention") == 1
    executable = pipeline.build_executable(scheduled.module, target, threads=2)
    virtual = relax.VirtualMachine(executable, tvm.cpu())
    return virtual["main"](*[tvm.runtime.tensor(a) for a in arrays]).numpy()


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_blocks_of_keys_follow_one_another_where_scores_exceed_the_cache(
    blocks: int, masked: bool, target: Target, rng: np.random.Generator
) -> None:
    case = MASKED if masked else replace(MASKED, bias=None)
    arrays = [rng.standard_normal(shape).astype("float32") for shape in case.inputs]
    # The largest score comes last in some rows and first in others.
    arrays[1] *= np.linspace(0, 4, case.keys, dtype="float32")[None, :, None]
    if masked:
        # Causal, which masks whole blocks of early rows; one row sees nothing.
        least = np.float32(-np.inf)
        arrays[-1] = np.where(np.tri(17, 203, 0, dtype=bool), arrays[-1], least)
        arrays[-1][1, 0, 5] = least
    actual = run_on(small(target, blocks, case), case, target, arrays)
    with np.errstate(invalid="ignore"):
        exact = case.oracle(arrays)
    assert np.isnan(exact).any() == masked
    np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=2e-5)


def test_more_blocks_than_have_code_of_their_own_stay_separate_kernels() -> None:
    before = module_of(Case(id="many keys", batch=1, heads=1, keys=4096))
    tiny = replace(MACHINE, l2_bytes=1 << 13)
    assert FuseAttention(tiny)(before)["main"].same_as(before["main"])
    assert not FuseAttention(MACHINE)(before)["main"].same_as(before["main"])


def test_queries_share_heads_of_keys_and_values_have_their_own_depth(
    run_op: Callable[..., tuple[np.ndarray, list[str]]], rng: np.random.Generator
) -> None:
    query = rng.standard_normal((2, 5, 6, 16)).astype("float32")
    key = rng.standard_normal((2, 9, 3, 16)).astype("float32")
    value = rng.standard_normal((2, 9, 3, 24)).astype("float32")
    actual, rules = run_op(
        lambda q, k, v: Attention(query=q, key=k, value=v, scale=0.25).call(), query, key, value
    )
    assert "attention" in rules
    key, value = (np.repeat(x.astype("float64"), 2, axis=2) for x in (key, value))
    scores = np.einsum("bmhd,bshd->bhms", query, key) / 4
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    shares = powers / powers.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        actual, np.einsum("bhms,bshd->bmhd", shares, value), rtol=1e-4, atol=2e-5
    )


def test_packed_heads_are_slices_of_one_tensor_and_nothing_is_permuted() -> None:
    case = Case(id="packed", batch=1, heads=2, rows=5, keys=5, depth=8, packed=True)
    builder = relax.BlockBuilder()
    x = relax.Var("x0", relax.TensorType((1, 5, 48), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            parts = []
            for first in (0, 2, 4):
                heads = builder.emit(op.reshape(x, (1, 5, 6, 8)))
                parts.append(builder.emit(op.strided_slice(heads, [2], [first], [first + 2], [1])))
            query, key, value = parts
            rows = builder.emit(Attention(query=query, key=key, value=value, scale=0.25).call())
            flat = builder.emit(op.reshape(rows, (1, 5, 16)))
            result = builder.emit_output(flat)
        builder.emit_func_output(result)
    after = FuseAttention(MACHINE)(module_of(case))
    tvm.ir.assert_structural_equal(after, builder.get())
