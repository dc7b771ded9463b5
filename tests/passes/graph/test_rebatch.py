from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import assert_structural_equal

from hone.errors import ModelError, UsageError
from hone.passes.graph.rebatch import Rebatch
from hone.passes.quantize import operators

RNG = np.random.default_rng(0)
Body = Callable[[Callable[[relax.Expr], relax.Var], relax.Var], relax.Expr]


def const(*shape: int) -> relax.Expr:
    return relax.const(RNG.standard_normal(shape).astype("float32"))


def module(shape: tuple[int, ...], body: Body) -> tvm.IRModule:
    """Return ``main`` of one input, with every binding of the body called ``layer``."""
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            result = body(lambda value: builder.emit(value, "layer"), x)
            result = builder.emit_output(result, "gv")
        builder.emit_func_output(result)
    return builder.get()


def runner(module: tvm.IRModule) -> Callable[[np.ndarray], list[np.ndarray]]:
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())

    def run(x: np.ndarray) -> list[np.ndarray]:
        result = machine["main"](tvm.runtime.tensor(np.ascontiguousarray(x)))
        tensors = [result] if hasattr(result, "numpy") else result
        return [tensor.numpy() for tensor in tensors]

    return run


def convolutional(emit: Callable, x: relax.Var) -> relax.Expr:
    y = emit(relax.op.nn.conv2d(x, const(4, 3, 3, 3), padding=1))
    y = emit(relax.op.add(y, const(1, 4, 1, 1)))
    norm = relax.op.nn.batch_norm(y, *[relax.const(np.ones(4, "f"))] * 4, axis=1, training=False)
    y = emit(relax.TupleGetItem(emit(norm), 0))
    y = emit(relax.op.nn.max_pool2d(emit(relax.op.clip(y, 0, 6)), [2, 2], [2, 2]))
    y = emit(relax.op.nn.pad(y, [0, 0, 0, 0, 1, 0, 0, 1]))
    flat = emit(relax.op.reshape(y, (1, -1)))
    return emit(relax.op.nn.softmax(emit(relax.op.matmul(flat, const(36, 5)))))


def attention(emit: Callable, x: relax.Var) -> relax.Expr:
    """Tokens of [1, 3, 4, 2]: class token, positions, two heads, merged rows, a pooled output."""
    tokens = emit(relax.op.permute_dims(emit(relax.op.reshape(x, (1, 3, 8))), [0, 2, 1]))
    tokens = emit(relax.op.concat([const(1, 1, 3), tokens], axis=1))
    tokens = emit(relax.op.add(tokens, const(1, 9, 3)))
    rows = emit(relax.op.matmul(emit(relax.op.reshape(tokens, (9, 3))), const(3, 6)))
    rows = emit(relax.op.add(rows, const(9, 6)))  # one entry per row of one sample: tiled
    heads = emit(relax.op.reshape(rows, (1, 9, 2, 3)))
    heads = emit(relax.op.permute_dims(heads, [0, 2, 1, 3]))
    scores = emit(relax.op.matmul(heads, emit(relax.op.permute_dims(heads, [0, 1, 3, 2]))))
    mixed = emit(relax.op.matmul(emit(relax.op.nn.softmax(scores)), heads))
    first = emit(relax.op.take(mixed, relax.const(0, "int64"), axis=2))
    parts = emit(relax.op.split(emit(relax.op.reshape(first, (1, 6))), 2, axis=1))
    mean = emit(relax.op.mean(mixed, [1, 2]))
    return relax.Tuple([emit(relax.TupleGetItem(parts, 1)), mean])


def sequence_first(emit: Callable, x: relax.Var) -> relax.Expr:
    y = emit(relax.op.permute_dims(x, [2, 0, 1, 3]))  # [4, batch, 3, 2]
    y = emit(relax.op.nn.layer_norm(y, const(2), const(2), axes=[-1]))
    y = emit(relax.op.reshape(y, (4, 1, 6)))
    y = emit(relax.op.squeeze(emit(relax.op.strided_slice(y, [0], [1], [2])), [0]))
    return emit(relax.op.expand_dims(y, [0]))


@pytest.mark.parametrize("body", [convolutional, attention, sequence_first])
def test_rebatch_equals_runs_of_one_sample_when_the_batch_grows(body: Body) -> None:
    before = module((1, 3, 4, 2) if body is not convolutional else (1, 3, 4, 5), body)
    after = Rebatch(3)(before)
    relax.analysis.well_formed(after)
    (param,) = after["main"].params
    x = RNG.standard_normal([int(extent) for extent in param.ty.shape]).astype("float32")
    axis = 1 if body is sequence_first else 0
    single, together = runner(before), runner(after)(x)
    for sample in range(3):
        for whole, part in zip(together, single(x[sample : sample + 1]), strict=True):
            # The same operations in the same order: only vectorization may differ.
            np.testing.assert_allclose(np.take(whole, [sample], axis), part, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("body", [convolutional, attention, sequence_first])
def test_rebatch_writes_the_small_module_again_when_the_batch_shrinks(body: Body) -> None:
    before = module((1, 3, 4, 2) if body is not convolutional else (1, 3, 4, 5), body)
    for between in (2, 6):
        apart = Rebatch(between)(Rebatch(6)(before))
        shape = [int(extent) for extent in before["main"].params[0].ty.shape]
        x = RNG.standard_normal([between, *shape[1:]]).astype("float32")
        want = runner(Rebatch(between)(before))(x)
        for found, expected in zip(runner(apart)(x), want, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_rebatch_raises_when_a_constant_differs_from_sample_to_sample() -> None:
    with pytest.raises(ModelError) as error:
        Rebatch(2)(module((4, 5), lambda emit, x: emit(relax.op.add(x, const(4, 5)))))
    assert str(error.value) == "layer: a constant differs from sample to sample"


def test_rebatch_multiplies_when_the_batch_is_not_one() -> None:
    before = module((2, 3, 4, 5), lambda emit, x: emit(relax.op.reshape(x, (2, 60))))
    want = module((6, 3, 4, 5), lambda emit, x: emit(relax.op.reshape(x, (6, 60))))
    assert_structural_equal(Rebatch(6)(before), want, map_free_vars=True)


def test_rebatch_returns_the_same_module_when_the_batch_is_the_same() -> None:
    before = module((2, 3), lambda emit, x: emit(relax.op.nn.relu(x)))
    assert Rebatch(2)(before).same_as(before)


def mixed_matmul(emit: Callable, x: relax.Var) -> relax.Expr:
    return emit(relax.op.matmul(x, emit(relax.op.permute_dims(x))))


REJECTED: list[tuple[Body, str]] = [
    (lambda emit, x: emit(relax.op.mean(x)), "it reduces over the samples of the batch"),
    (
        lambda emit, x: emit(relax.op.nn.softmax(x, axis=0)),
        "it works across the samples of the batch",
    ),
    (
        lambda emit, x: emit(relax.op.concat([x, x], axis=0)),
        "it concatenates samples, or tensors with different batch axes",
    ),
    (mixed_matmul, "a matmul would mix the samples of its two operands"),
    (
        lambda emit, x: emit(relax.op.matmul(emit(relax.op.permute_dims(x)), const(1, 2))),
        "a matmul would sum over the samples",
    ),
    (lambda emit, x: emit(relax.op.squeeze(x, [0])), "it removes the batch axis"),
    (lambda emit, x: emit(relax.op.flip(x, 1)), "no rule says how relax.flip carries the batch"),
    (
        lambda emit, x: emit(relax.op.take(x, relax.const(0, "int64"), axis=0)),
        "it takes some samples of the batch",
    ),
    (lambda emit, x: emit(relax.op.nn.pad(x, [1, 0, 0, 0])), "it pads the batch"),
    (
        lambda emit, x: emit(relax.op.add(x, emit(relax.op.permute_dims(x)))),
        "the batch is along different axes of its operands",
    ),
]


@pytest.mark.parametrize(("body", "message"), REJECTED, ids=[text[:40] for _, text in REJECTED])
def test_rebatch_raises_with_the_layer_when_samples_would_mix(body: Body, message: str) -> None:
    with pytest.raises(ModelError) as error:
        Rebatch(3)(module((1, 5), body))
    layer, _, text = str(error.value).partition(": ")
    assert text == message
    assert layer.startswith("layer")


def test_rebatch_raises_when_an_output_does_not_depend_on_the_inputs() -> None:
    with pytest.raises(ModelError) as error:
        Rebatch(3)(module((1, 5), lambda emit, x: relax.Tuple([x, const(2)])))
    assert str(error.value) == "an output does not depend on the batch of the inputs"


def test_rebatch_raises_when_the_batch_does_not_divide() -> None:
    with pytest.raises(ModelError) as error:
        Rebatch(3)(module((2, 5), lambda emit, x: emit(relax.op.nn.relu(x))))
    assert str(error.value) == (
        "inputs with one leading dimension that is a divisor or a multiple of 3 are required, "
        "given are x [2, 5]"
    )


def test_rebatch_raises_when_the_batch_is_not_positive() -> None:
    with pytest.raises(UsageError) as error:
        Rebatch(0)
    assert str(error.value) == "the batch must be at least 1, not 0"


def test_sums_of_levels_follow_the_batch() -> None:
    x = relax.Var("x", relax.TensorType((4, 3, 5, 6), "uint8"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            rows = builder.emit(operators.row_sums(x), "rows")
            border = relax.const(np.zeros((1,), "int32"))
            sums = operators.window_sums(rows, border, taps=(3, 3), padding=(1, 1, 1, 1))
            result = builder.emit_output(sums, "sums")
        builder.emit_func_output(result)
    smaller = Rebatch(2)(builder.get())["main"]
    assert [int(extent) for extent in smaller.body.body.ty.shape] == [2, 3, 5, 1]
