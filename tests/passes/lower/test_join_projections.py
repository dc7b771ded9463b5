"""Projections that share their input: what is joined, what is left alone, what is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from tvm import relax

from hone import pipeline
from hone.passes.apply import apply
from hone.passes.lower.fuse_attention import FuseAttention
from hone.passes.lower.join_projections import JoinProjections
from hone.targets.schedule.machine import Machine
from hone.targets.target import Target, resolve

MACHINE = Machine.of(resolve("x86-64-v3"), 2)
BATCH, ROWS, WIDTH, DEPTH = 2, 5, 11, 8
op = relax.op


@dataclass(frozen=True, kw_only=True)
class Case:
    """An attention of projections.

    Parameters
    ----------
    heads : int
        Of the queries; ``groups`` of keys and values.
    inputs : tuple of int
        Which input queries, keys and values are projected from.
    bias : tuple of bool
        Which of them have one.
    reuse : bool
        The projected queries are read by something else too.
    """

    id: str
    heads: int = 3
    groups: int = 3
    inputs: tuple[int, int, int] = (0, 0, 0)
    bias: tuple[bool, bool, bool] = (True, True, True)
    reuse: bool = False
    channels: int = DEPTH

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [
            (self.heads, DEPTH),
            (self.groups, DEPTH),
            (self.groups, self.channels),
        ]

    def weights(self) -> list[tuple[np.ndarray, np.ndarray]]:
        rng = np.random.default_rng(7)
        return [
            (
                rng.standard_normal((WIDTH, heads * depth)).astype("float32") / 3,
                rng.standard_normal(heads * depth).astype("float32"),
            )
            for heads, depth in self.shapes
        ]

    def graph(self, *inputs: relax.Expr, emit: Callable[[relax.Expr], relax.Var]) -> relax.Expr:
        operands, projected = [], []
        for at, (weight, bias) in enumerate(self.weights()):
            value = emit(op.matmul(inputs[self.inputs[at]], relax.const(weight)))
            if self.bias[at]:
                value = emit(op.add(relax.const(bias), value))
            projected.append(value)
            heads, depth = self.shapes[at]
            rows = emit(op.reshape(value, (BATCH, ROWS, heads, depth)))
            operands.append(emit(op.permute_dims(rows, [0, 2, 1, 3])))
        query, key, value = (
            operand if index == 0 else self._repeated(operand, emit)
            for index, operand in enumerate(operands)
        )
        scores = emit(op.matmul(query, emit(op.permute_dims(key, [0, 1, 3, 2]))))
        shares = emit(op.nn.softmax(emit(op.multiply(scores, relax.const(np.float32(0.25))))))
        result = emit(op.permute_dims(emit(op.matmul(shares, value)), [0, 2, 1, 3]))
        result = emit(op.reshape(result, (BATCH, ROWS, -1)))
        return emit(op.concat([result, projected[0]], axis=-1)) if self.reuse else result

    def _repeated(self, operand: relax.Expr, emit: Callable[[relax.Expr], relax.Var]) -> relax.Expr:
        times = self.heads // self.groups
        if times == 1:
            return operand
        depth = int(operand.ty.shape[-1])
        single = emit(op.reshape(operand, (BATCH, self.groups, 1, ROWS, depth)))
        wide = emit(op.broadcast_to(single, (BATCH, self.groups, times, ROWS, depth)))
        return emit(op.reshape(wide, (BATCH, self.heads, ROWS, depth)))

    def oracle(self, arrays: list[np.ndarray]) -> np.ndarray:
        operands, projected = [], []
        for at, (weight, bias) in enumerate(self.weights()):
            value = arrays[self.inputs[at]].astype("float64") @ weight
            value = value + bias if self.bias[at] else value
            projected.append(value)
            heads, depth = self.shapes[at]
            value = value.reshape(BATCH, ROWS, heads, depth).transpose(0, 2, 1, 3)
            operands.append(np.repeat(value, self.heads // heads, axis=1))
        scores = operands[0] @ operands[1].swapaxes(-1, -2) * 0.25
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        result = powers / powers.sum(-1, keepdims=True) @ operands[2]
        result = result.transpose(0, 2, 1, 3).reshape(BATCH, ROWS, -1)
        return np.concatenate([result, projected[0]], -1) if self.reuse else result


def module_of(case: Case) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    inputs = [
        relax.Var(f"x{i}", relax.TensorType((BATCH, ROWS, WIDTH), "float32"))
        for i in range(max(case.inputs) + 1)
    ]
    with builder.function("main", inputs):
        with builder.dataflow():
            result = builder.emit_output(case.graph(*inputs, emit=builder.emit))
        builder.emit_func_output(result)
    return builder.get()


def products(module: tvm.IRModule) -> int:
    bindings = module["main"].body.blocks[0].bindings
    return sum(
        isinstance(b.value, relax.Call) and b.value.op.name == "relax.matmul" for b in bindings
    )


JOINED = {
    Case(id="all three"): 1,
    Case(id="no bias", bias=(False, False, False)): 1,
    Case(id="the keys have no bias", bias=(True, False, True)): 2,
    Case(id="keys and values", inputs=(0, 1, 1)): 2,
    Case(id="queries and keys", inputs=(0, 0, 1)): 2,
    Case(id="queries share heads", heads=4, groups=2): 1,
    Case(id="values have a depth of their own", channels=16): 2,
    Case(id="the queries are read again", reuse=True): 2,
}


@pytest.mark.parametrize("case", JOINED, ids=lambda case: case.id)
def test_projections_of_one_input_are_one_product(
    case: Case, target: Target, rng: np.random.Generator
) -> None:
    module = module_of(case)
    assert products(apply(module, FuseAttention(MACHINE), JoinProjections())) == JOINED[case]
    inputs = range(max(case.inputs) + 1)
    arrays = [rng.standard_normal((BATCH, ROWS, WIDTH)).astype("float32") for _ in inputs]
    lowered = pipeline.lower(module, target, threads=2)
    scheduled = pipeline.schedule(lowered, target, threads=2)
    assert [d.rule for d in scheduled.decisions].count("attention") == 1
    executable = pipeline.build_executable(scheduled.module, target, threads=2)
    virtual = relax.VirtualMachine(executable, tvm.cpu())
    actual = virtual["main"](*[tvm.runtime.tensor(a) for a in arrays]).numpy()
    np.testing.assert_allclose(actual, case.oracle(arrays), rtol=1e-4, atol=2e-5)


REJECTED = [
    Case(id="three inputs", inputs=(0, 1, 2)),
    Case(id="one with a bias, one without, one read again", bias=(True, True, False), reuse=True),
]


@pytest.mark.parametrize("case", REJECTED, ids=lambda case: case.id)
def test_projections_that_share_nothing_stay_as_they_are(case: Case) -> None:
    before = apply(module_of(case), FuseAttention(MACHINE))
    assert JoinProjections()(before)["main"].same_as(before["main"])


def test_heads_of_one_number_are_neighbours_where_there_are_as_many_of_each() -> None:
    case = Case(id="golden")
    after = apply(module_of(case), FuseAttention(MACHINE), JoinProjections())["main"]
    bindings = after.body.blocks[0].bindings
    values = [b.value for b in bindings if isinstance(b.value, relax.Call)]
    (product,) = (v for v in values if v.op.name == "relax.matmul")
    weight = product.args[1].value.numpy().reshape(WIDTH, 3, 3, DEPTH)
    for index, (part, _) in enumerate(case.weights()):
        np.testing.assert_array_equal(weight[:, :, index], part.reshape(WIDTH, 3, DEPTH))
    cuts = [v for v in values if v.op.name == "relax.strided_slice"]
    places = [[int(part.fields[0]) for part in cut.args[1:]] for cut in cuts]
    assert places == [[2, 0, 7, 3], [2, 1, 8, 3], [2, 2, 9, 3]]
