"""Moves of channels become orders of weights; what minds an order is left as it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import assert_structural_equal

from hone.passes.apply import apply
from hone.passes.graph.channel_gather import ChannelGather, Source, joined, runs
from hone.passes.graph.fold_channel_moves import FoldChannelMoves

Emit = Callable[[relax.Expr], relax.Var]
Body = Callable[[Emit, relax.Var], relax.Expr]


def weight(*shape: int) -> relax.Expr:
    rng = np.random.default_rng(sum(shape))
    return relax.const(rng.standard_normal(shape).astype("float32"))


def module(shape: tuple[int, ...], body: Body) -> tvm.IRModule:
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(builder.normalize(body(builder.emit, x)), "gv")
        builder.emit_func_output(result)
    return builder.get()


def run(of: tvm.IRModule, x: np.ndarray) -> list[np.ndarray]:
    machine = relax.VirtualMachine(tvm.compile(of, "llvm"), tvm.cpu())
    result = machine["main"](tvm.runtime.tensor(x))
    return [tensor.numpy() for tensor in ([result] if hasattr(result, "numpy") else result)]


def operators(of: tvm.IRModule) -> list[str]:
    return [
        str(binding.value.op.name).removeprefix("relax.")
        for binding in of["main"].body.blocks[0].bindings
        if isinstance(binding.value, relax.Call)
    ]


def pointwise(emit: Emit, x: relax.Expr, channels: int) -> relax.Var:
    conv = emit(relax.op.nn.conv2d(x, weight(channels, x.ty.shape[1].value, 1, 1)))
    return emit(relax.op.nn.relu(conv))


def shuffle(emit: Emit, x: relax.Var, groups: int = 2) -> relax.Var:
    batch, channels, height, width = (int(e) for e in x.ty.shape)
    split = emit(relax.op.reshape(x, (batch, groups, channels // groups, height, width)))
    swapped = emit(relax.op.permute_dims(split, [0, 2, 1, 3, 4]))
    return emit(relax.op.reshape(swapped, (batch, channels, height, width)))


def unit(emit: Emit, left: relax.Expr, right: relax.Expr) -> relax.Var:
    """The second half of a unit of ShuffleNet: both halves joined and shuffled."""
    return shuffle(emit, emit(relax.op.concat([left, right], axis=1)))


def shufflenet(emit: Emit, x: relax.Var) -> relax.Expr:
    """Two units of 10 channels, and a stage with stride 2 behind them."""
    y = unit(emit, pointwise(emit, x, 5), pointwise(emit, x, 5))
    for _ in range(2):
        halves = emit(relax.op.split(y, [5], axis=1))
        left, right = (emit(relax.TupleGetItem(halves, i)) for i in range(2))
        right = pointwise(emit, right, 5)
        right = emit(relax.op.nn.conv2d(right, weight(5, 1, 3, 3), padding=1, groups=5))
        y = unit(emit, left, emit(relax.op.add(right, weight(1, 5, 1, 1))))
    down = emit(relax.op.nn.conv2d(y, weight(10, 1, 3, 3), strides=2, padding=1, groups=10))
    down = emit(relax.op.add(down, weight(1, 10, 1, 1)))
    pooled = emit(relax.op.nn.max_pool2d(y, [3, 3], strides=2, padding=1))
    return emit(relax.op.concat([pointwise(emit, down, 3), pointwise(emit, pooled, 4)], axis=1))


def test_shuffled_halves_become_slices_and_permuted_weights() -> None:
    def before(emit: Emit, x: relax.Var) -> relax.Expr:
        y = unit(emit, pointwise(emit, x, 4), pointwise(emit, x, 4))
        right = emit(relax.op.strided_slice(y, axes=[1], begin=[4], end=[8]))
        return relax.op.nn.conv2d(right, weight(3, 4, 1, 1))

    def expected(emit: Emit, x: relax.Var) -> relax.Expr:
        a, b = pointwise(emit, x, 4), pointwise(emit, x, 4)
        parts = [emit(relax.op.strided_slice(v, axes=[1], begin=[2], end=[4])) for v in (a, b)]
        # The second half of the shuffle is a2, b2, a3, b3.
        values = weight(3, 4, 1, 1).value.numpy()[:, [0, 2, 1, 3]]
        return relax.op.nn.conv2d(emit(relax.op.concat(parts, axis=1)), relax.const(values.copy()))

    after = apply(module((1, 3, 5, 7), before), FoldChannelMoves())
    assert_structural_equal(after, module((1, 3, 5, 7), expected))
    assert_structural_equal(apply(after, FoldChannelMoves()), after)


def test_network_of_shuffles_computes_what_it_did_without_any(rng: np.random.Generator) -> None:
    before = module((2, 3, 6, 5), shufflenet)
    after = apply(before, FoldChannelMoves())
    assert {"reshape", "permute_dims", "split"} <= set(operators(before))
    assert not {"reshape", "permute_dims", "split"} & set(operators(after))
    x = rng.standard_normal((2, 3, 6, 5)).astype("float32")
    for got, want in zip(run(after, x), run(before, x), strict=True):
        # Sums of at most ten products of magnitude 10 in another order.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_parts_of_one_tensor_that_lie_side_by_side_are_taken_whole() -> None:
    def before(emit: Emit, x: relax.Var) -> relax.Expr:
        halves = emit(relax.op.split(pointwise(emit, x, 6), 2, axis=1))
        left, right = (emit(relax.TupleGetItem(halves, i)) for i in range(2))
        more = pointwise(emit, right, 2)
        return pointwise(emit, emit(relax.op.concat([left, right, more], axis=1)), 4)

    after = apply(module((1, 3, 4, 4), before), FoldChannelMoves())
    joins = [
        binding.value.args[0].fields
        for binding in after["main"].body.blocks[0].bindings
        if isinstance(binding.value, relax.Call) and binding.value.op.name == "relax.concat"
    ]
    assert [[int(part.ty.shape[1]) for part in parts] for parts in joins] == [[6, 2]]


def test_channels_that_occur_twice_keep_their_weights(rng: np.random.Generator) -> None:
    def before(emit: Emit, x: relax.Var) -> relax.Expr:
        y = pointwise(emit, x, 4)
        return relax.op.nn.conv2d(unit(emit, y, y), weight(3, 8, 3, 3), padding=1)

    old = module((1, 3, 4, 5), before)
    x = rng.standard_normal((1, 3, 4, 5)).astype("float32")
    new = apply(old, FoldChannelMoves())
    np.testing.assert_allclose(run(new, x)[0], run(old, x)[0], rtol=1e-5, atol=1e-4)


def test_operator_between_two_transpositions_keeps_its_axes(rng: np.random.Generator) -> None:
    def before(emit: Emit, x: relax.Var) -> relax.Expr:
        y = emit(relax.op.concat([pointwise(emit, x, 4), pointwise(emit, x, 4)], axis=1))
        y = emit(relax.op.nn.relu(emit(relax.op.permute_dims(y, [0, 2, 1, 3]))))
        y = emit(relax.op.permute_dims(y, [0, 2, 1, 3]))
        return relax.op.nn.conv2d(y, weight(3, 8, 1, 1))

    old = module((1, 3, 4, 4), before)
    x = rng.standard_normal((1, 3, 4, 4)).astype("float32")
    new = apply(old, FoldChannelMoves())
    np.testing.assert_allclose(run(new, x)[0], run(old, x)[0], rtol=1e-5, atol=1e-4)


def _shuffle_is_returned(emit: Emit, x: relax.Var) -> relax.Expr:
    y = unit(emit, pointwise(emit, x, 4), pointwise(emit, x, 4))
    return relax.op.nn.relu(y)


def _weights_are_computed(emit: Emit, x: relax.Var) -> relax.Expr:
    y = unit(emit, pointwise(emit, x, 4), pointwise(emit, x, 4))
    return relax.op.nn.conv2d(y, emit(relax.op.exp(weight(3, 8, 1, 1))))


def _grouped(emit: Emit, x: relax.Var) -> relax.Expr:
    y = unit(emit, pointwise(emit, x, 4), pointwise(emit, x, 4))
    return relax.op.nn.conv2d(y, weight(4, 4, 1, 1), groups=2)


def _plain_join(emit: Emit, x: relax.Var) -> relax.Expr:
    y = emit(relax.op.concat([pointwise(emit, x, 4), pointwise(emit, x, 3)], axis=1))
    return relax.op.nn.conv2d(y, weight(3, 7, 1, 1))


def _rows_are_swapped(emit: Emit, x: relax.Var) -> relax.Expr:
    y = emit(relax.op.permute_dims(pointwise(emit, x, 4), [0, 1, 3, 2]))
    return relax.op.nn.conv2d(y, weight(3, 4, 1, 1))


def _rows_become_channels(emit: Emit, x: relax.Var) -> relax.Expr:
    y = emit(relax.op.reshape(pointwise(emit, x, 4), (1, 8, 2, 5)))
    return relax.op.nn.conv2d(y, weight(3, 8, 1, 1))


def _joined_along_rows(emit: Emit, x: relax.Var) -> relax.Expr:
    y = emit(relax.op.concat([pointwise(emit, x, 4), pointwise(emit, x, 4)], axis=2))
    return relax.op.nn.conv2d(y, weight(3, 4, 1, 1))


def _strided(emit: Emit, x: relax.Var) -> relax.Expr:
    y = pointwise(emit, x, 4)
    y = emit(relax.op.strided_slice(y, axes=[2], begin=[0], end=[4], strides=[2]))
    return relax.op.nn.conv2d(y, weight(3, 4, 1, 1))


def _added_to_another(emit: Emit, x: relax.Var) -> relax.Expr:
    y = unit(emit, pointwise(emit, x, 4), pointwise(emit, x, 4))
    y = emit(relax.op.add(y, pointwise(emit, x, 8)))
    return relax.op.nn.conv2d(y, weight(3, 8, 1, 1))


def _somebody_minds(emit: Emit, x: relax.Var) -> relax.Expr:
    y = unit(emit, pointwise(emit, x, 4), pointwise(emit, x, 4))
    return relax.op.add(emit(relax.op.nn.conv2d(y, weight(8, 8, 1, 1))), y)


def _each_channel_twice(emit: Emit, x: relax.Var) -> relax.Expr:
    y = pointwise(emit, x, 32)  # Side by side that is a slice for each of them.
    return relax.op.nn.conv2d(unit(emit, y, y), weight(3, 64, 1, 1))


REJECTED = [
    _shuffle_is_returned, _weights_are_computed, _grouped, _plain_join, _rows_are_swapped,
    _rows_become_channels, _joined_along_rows, _strided, _added_to_another,
    _somebody_minds, _each_channel_twice,
]  # fmt: skip


@pytest.mark.parametrize("body", REJECTED, ids=lambda body: body.__name__.strip("_"))
def test_function_stays_when_an_order_matters_or_nothing_is_gained(body: Body) -> None:
    before = module((1, 3, 4, 5), body)
    assert apply(before, FoldChannelMoves())["main"].same_as(before["main"])


def test_runs_are_what_lies_side_by_side() -> None:
    assert runs(np.array([[0, 4], [0, 5], [0, 6], [1, 0], [1, 1], [1, 3]])) == [
        (0, 4, 7), (1, 0, 2), (1, 3, 4),
    ]  # fmt: skip


def test_shuffle_of_two_tensors_takes_their_channels_in_turn() -> None:
    a, b = (relax.Var(name, relax.TensorType((1, 3, 2, 2), "float32")) for name in "ab")
    both = joined([ChannelGather.of(Source(var=v, axis=1)) for v in (a, b)], 1)
    shuffled = both.reshaped((1, 2, 3, 2, 2)).permuted([0, 2, 1, 3, 4]).reshaped((1, 6, 2, 2))
    assert shuffled.flat.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1], [0, 2], [1, 2]]
    assert shuffled.is_image(1)
    assert shuffled.moves == 4
