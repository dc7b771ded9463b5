"""Which layers read data whose scale a normalization has set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax

from hone.passes.apply import apply
from hone.passes.graph.fold_batch_norm import BATCH_NORMALIZED, FoldBatchNorm
from hone.passes.lower.known_scale import known_scale

WIDTH = 8
Chain = Callable[[relax.Expr, relax.Expr], relax.Expr]


def ones(*shape: int) -> relax.Expr:
    return relax.const(np.ones(shape, "float32"))


def norm(x: relax.Expr) -> relax.Expr:
    return relax.op.nn.layer_norm(x, ones(WIDTH), ones(WIDTH), axes=-1)


CHAINS: dict[str, tuple[Chain, bool]] = {
    "an input": (lambda x, _: x, False),
    "an input behind plain layers": (
        lambda x, _: relax.op.nn.relu(relax.op.matmul(x, ones(WIDTH, WIDTH))),
        False,
    ),
    "a norm": (lambda x, _: norm(x), True),
    "a norm behind layers, before others": (
        lambda x, _: relax.op.nn.relu(relax.op.matmul(norm(x), ones(WIDTH, WIDTH))),
        True,
    ),
    "a norm plus an input": (lambda x, y: relax.op.add(norm(x), y), False),
    "two norms": (lambda x, y: relax.op.add(norm(x), norm(y)), True),
    "ReLU6": (lambda x, _: relax.op.clip(x, 0, 6), True),
    "a clip to anything": (lambda x, _: relax.op.clip(x, 0, 1e6), False),
    "a sigmoid": (lambda x, _: relax.op.sigmoid(x), True),
    "numbers": (lambda _x, _y: ones(4, WIDTH), True),
}


@pytest.mark.parametrize(("chain", "known"), CHAINS.values(), ids=list(CHAINS))
def test_a_scale_is_known_behind_normalizations_on_every_path(chain: Chain, known: bool) -> None:
    weight = ones(WIDTH, WIDTH)
    builder = relax.BlockBuilder()
    x, y = (relax.Var(name, relax.TensorType((4, WIDTH), "float32")) for name in "xy")
    with builder.function("main", [x, y]):
        with builder.dataflow():
            data = builder.emit(chain(x, y))
            result = builder.emit_output(relax.op.matmul(data, weight))
        builder.emit_func_output(result)
    assert (weight in known_scale(builder.get())) is known


def test_rows_of_a_table_have_a_scale_that_their_indices_do_not_change() -> None:
    weight = ones(WIDTH, WIDTH)
    builder = relax.BlockBuilder()
    ids = relax.Var("ids", relax.TensorType((4,), "int64"))
    with builder.function("main", [ids]):
        with builder.dataflow():
            rows = builder.emit(relax.op.take(ones(100, WIDTH), ids, axis=0))
            result = builder.emit_output(relax.op.matmul(rows, weight))
        builder.emit_func_output(result)
    assert weight in known_scale(builder.get())


def convolutions(*, normalized: bool) -> tvm.IRModule:
    """Return two 1x1 convolutions, the first with a bias and perhaps a batch norm."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, WIDTH, 4, 4), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            first = builder.emit(relax.op.nn.conv2d(x, ones(WIDTH, WIDTH, 1, 1)), "first")
            first = builder.emit(relax.op.add(first, ones(1, WIDTH, 1, 1)), "bias")
            if normalized:
                statistics = [ones(WIDTH) for _ in range(4)]
                pair = relax.op.nn.batch_norm(first, *statistics, axis=1, training=False)
                first = builder.emit(relax.TupleGetItem(builder.emit(pair, "norm"), 0), "normed")
            data = builder.emit(relax.op.nn.relu(first), "relu")
            last = relax.op.nn.conv2d(data, ones(WIDTH, WIDTH, 1, 1))
            result = builder.emit_output(last, "second")
        builder.emit_func_output(result)
    return builder.get()


@pytest.mark.parametrize("normalized", [True, False])
def test_folded_batch_norms_are_remembered(normalized: bool) -> None:
    module = apply(convolutions(normalized=normalized), FoldBatchNorm())
    weights = [
        binding.value.args[1]
        for binding in module["main"].body.blocks[0].bindings
        if isinstance(binding.value, relax.Call) and binding.value.op.name == "relax.nn.conv2d"
    ]
    scaled = known_scale(module)
    assert [weight in scaled for weight in weights] == [False, normalized]
    if normalized:
        assert "first" in module["main"].attrs[BATCH_NORMALIZED]
        # Folding again finds nothing, and forgets nothing.
        again = apply(module, FoldBatchNorm())
        assert list(again["main"].attrs[BATCH_NORMALIZED]) == ["bias", "first"]
