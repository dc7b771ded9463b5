from __future__ import annotations

import numpy as np
import pytest
import tvm
from numpy.lib.stride_tricks import sliding_window_view
from tvm import relax
from tvm.ir import assert_structural_equal

from hone import models
from hone.errors import UsageError
from hone.passes.graph.fold_batch_norm import FoldBatchNorm
from hone.passes.prune.channel_groups import find
from hone.passes.prune.prune_channels import PruneChannels, PrunedGroup, SkippedGroup


def conv(x: np.ndarray, w: np.ndarray, groups: int = 1, pad: int = 0) -> np.ndarray:
    """Convolution of [N, C, H, W] by its definition, stride 1."""
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = sliding_window_view(x, w.shape[2:], axis=(2, 3))
    outputs, inputs = w.shape[0] // groups, w.shape[1]
    parts = [
        np.einsum(
            "ncyxhw,kchw->nkyx",
            windows[:, g * inputs : (g + 1) * inputs],
            w[g * outputs : (g + 1) * outputs],
        )
        for g in range(groups)
    ]
    return np.concatenate(parts, axis=1)


def run(module: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x)).numpy()


def shapes(module: tvm.IRModule) -> dict[str, tuple[int, ...]]:
    variables = [binding.var for binding in module["main"].body.blocks[0].bindings]
    return {
        str(var.name): tuple(map(int, var.ty.shape))
        for var in variables
        if isinstance(var.ty, relax.TensorType)
    }


class Weights:
    """Seeded weights of the network below: conv, depthwise, residual, concat, flatten, linear."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.x = rng.standard_normal((1, 3, 5, 4))
        self.a = rng.standard_normal((6, 3, 3, 3))
        self.bias = rng.standard_normal((1, 6, 1, 1))
        self.dw = rng.standard_normal((6, 1, 3, 3))
        self.b = rng.standard_normal((6, 6, 1, 1))
        self.c = rng.standard_normal((4, 6, 1, 1))
        self.fc = rng.standard_normal((5, (6 + 4) * 5 * 4))
        self.statistics = rng.uniform(0.5, 1.5, (4, 4))

    def module(self) -> tvm.IRModule:
        def const(value: np.ndarray) -> relax.Expr:
            return relax.const(value.astype("float32"))

        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType(self.x.shape, "float32"))
        with builder.function("main", [x]):
            with builder.dataflow():
                emit, nn = builder.emit, relax.op.nn
                y = emit(nn.conv2d(x, const(self.a), padding=1), "a_conv")
                a = emit(nn.relu(emit(relax.op.add(y, const(self.bias)), "a")), "relu")
                dw = emit(nn.conv2d(a, const(self.dw), padding=1, groups=6), "dw")
                b = emit(nn.conv2d(dw, const(self.b)), "b")
                s = emit(relax.op.add(a, b), "sum")
                c = emit(nn.conv2d(s, const(self.c)), "c")
                norm = emit(
                    nn.batch_norm(
                        c, *map(const, self.statistics), axis=1, epsilon=0.0, training=False
                    ),
                    "bn",
                )
                c = emit(relax.TupleGetItem(norm, 0), "bn_y")
                joined = emit(relax.op.concat([s, c], axis=1), "cat")
                flat = emit(relax.op.reshape(joined, (1, -1)), "flat")
                weight = emit(relax.op.permute_dims(const(self.fc)), "t")
                gv = builder.emit_output(relax.op.matmul(flat, weight), "gv")
            builder.emit_func_output(gv)
        return builder.get()

    def keep(self, first: list[int], second: list[int]) -> np.ndarray:
        """The network written in numpy, with only these channels of each of the two groups."""
        a = np.maximum(conv(self.x, self.a[first], pad=1) + self.bias[:, first], 0)
        b = conv(conv(a, self.dw[first], len(first), pad=1), self.b[np.ix_(first, first)])
        s = a + b
        c = conv(s, self.c[np.ix_(second, first)])
        gamma, beta, mean, var = self.statistics[:, second].reshape(4, 1, -1, 1, 1)
        c = gamma * (c - mean) / np.sqrt(var) + beta
        flat = np.concatenate([s, c], axis=1).reshape(1, -1)
        fc = self.fc.reshape(5, 10, 20)[:, [*first, *(6 + k for k in second)]]
        return flat @ fc.reshape(5, -1).T


def kept(module: tvm.IRModule, prune: PruneChannels) -> dict[str, list[int]]:
    return {group.layers[0]: list(group.kept) for group in prune.plan(module).pruned}


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_prune_equals_numpy_with_the_kept_channels_when_everything_is_coupled(norm: str) -> None:
    weights = Weights()
    before = weights.module()
    prune = PruneChannels(amount=0.5, norm=norm)
    after = prune(before)

    def norms(w: np.ndarray) -> np.ndarray:
        w = w.astype("float32").reshape(len(w), -1)
        values = np.abs(w).sum(1) if norm == "l1" else np.sqrt((w**2).sum(1))
        return values / values.mean()

    first = norms(weights.a) + norms(weights.dw) + norms(weights.b)
    want = {
        "a_conv": sorted(int(k) for k in np.argsort(-first)[:3]),
        "c": sorted(int(k) for k in np.argsort(-norms(weights.c))[:2]),
    }
    assert kept(before, prune) == want
    assert shapes(after)["flat"] == (1, 5 * 20)
    # float32 sums of 100 products of size about 10.
    np.testing.assert_allclose(
        run(after, weights.x.astype("float32")),
        weights.keep(want["a_conv"], want["c"]),
        rtol=1e-4,
        atol=1e-2,
    )


def test_prune_leaves_the_result_when_removed_channels_contribute_nothing() -> None:
    weights = Weights()
    dead = [1, 2, 5]
    for filters in (weights.a, weights.bias.reshape(6, 1), weights.dw, weights.b):
        filters[dead] = 0.0
    before = weights.module()
    # Three of the ten channels: the dead ones.
    prune = PruneChannels(amount=0.3, scope="global")
    assert kept(before, prune) == {"a_conv": [0, 3, 4]}
    x = weights.x.astype("float32")
    np.testing.assert_allclose(run(prune(before), x), run(before, x), rtol=1e-4, atol=1e-3)


def chain(filters: np.ndarray, amount_consumer: int = 2) -> tvm.IRModule:
    """Input [1, 1, 2, 3] → 1 × 1 convolution with these filters → 1 × 1 convolution."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 1, 2, 3), "float32"))
    size = len(filters)
    consumer = np.arange(amount_consumer * size, dtype="float32")
    with builder.function("main", [x]):
        with builder.dataflow():
            weight = relax.const(np.asarray(filters, "float32").reshape(size, 1, 1, 1))
            y = builder.emit(relax.op.nn.conv2d(x, weight), "one")
            weight = relax.const(consumer.reshape(amount_consumer, size, 1, 1))
            gv = builder.emit_output(relax.op.nn.conv2d(y, weight), "gv")
        builder.emit_func_output(gv)
    return builder.get()


def test_prune_cuts_producer_and_consumer_when_golden() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 1, 2, 3), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            weight = relax.const(np.array([-3, 2], "float32").reshape(2, 1, 1, 1))
            y = builder.emit(relax.op.nn.conv2d(x, weight), "one")
            weight = relax.const(np.array([[1, 2], [5, 6]], "float32").reshape(2, 2, 1, 1))
            gv = builder.emit_output(relax.op.nn.conv2d(y, weight), "gv")
        builder.emit_func_output(gv)
    after = PruneChannels(amount=0.5)(chain(np.array([1, -3, 2, 0.5])))
    assert_structural_equal(after, builder.get(), map_free_vars=True)


def test_prune_keeps_the_lower_channels_when_all_filters_tie() -> None:
    for scope in ("local", "global"):
        prune = PruneChannels(amount=0.5, scope=scope)
        assert kept(chain(np.ones(6)), prune) == {"one": [0, 1, 2]}


@pytest.mark.parametrize(
    ("round_to", "minimum", "count"),
    # Half of 12 is 6. Nearest multiples: 8 of 8 and of 4 (halves up), never zero, at most all.
    [(1, 1, 6), (4, 1, 8), (8, 1, 8), (5, 1, 5), (16, 1, 12), (1, 9, 9), (1, 99, 12)],
)
def test_prune_keeps_a_multiple_when_round_to_is_given(
    round_to: int, minimum: int, count: int
) -> None:
    before = chain(np.arange(1, 13))
    prune = PruneChannels(amount=0.5, round_to=round_to, minimum=minimum)
    after = prune(before)
    assert shapes(after)["one"][1] == count
    if count == 12:
        assert after.same_as(before)
        assert prune.plan(before).skipped[0] == SkippedGroup(
            layers=("one",),
            size=12,
            reason="12 of 12 channels stay at this amount, rounding and minimum",
        )
    else:
        assert prune.plan(before).pruned == (
            PrunedGroup(layers=("one",), size=12, kept=tuple(range(12 - count, 12))),
        )


def test_prune_returns_the_same_module_when_everything_is_frozen() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            weight = relax.const(np.ones((3, 4), "float32"))
            gv = builder.emit_output(relax.op.matmul(x, weight), "gv")
        builder.emit_func_output(gv)
    before = builder.get()
    assert PruneChannels()(before).same_as(before)
    (skipped,) = PruneChannels().plan(before).skipped
    assert skipped.reason == "the channels are an output of the network"


def test_prune_does_not_change_its_input_when_it_removes_channels() -> None:
    before = chain(np.arange(1, 7))
    text = before.script()
    PruneChannels()(before)
    assert before.script() == text


def test_prune_updates_groups_when_a_depthwise_multiplier_widens() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 2, 4, 3))
    a, dw = rng.standard_normal((4, 2, 1, 1)), rng.standard_normal((8, 1, 2, 2))
    b = rng.standard_normal((3, 8, 1, 1))
    builder = relax.BlockBuilder()
    var = relax.Var("x", relax.TensorType(x.shape, "float32"))
    with builder.function("main", [var]):
        with builder.dataflow():
            consts = [relax.const(w.astype("float32")) for w in (a, dw, b)]
            y = builder.emit(relax.op.nn.conv2d(var, consts[0]), "a")
            y = builder.emit(relax.op.nn.conv2d(y, consts[1], groups=4), "dw")
            gv = builder.emit_output(relax.op.nn.conv2d(y, consts[2]), "gv")
        builder.emit_func_output(gv)
    before = builder.get()
    prune = PruneChannels(amount=0.25)
    (channels,) = kept(before, prune).values()
    wide = [2 * k + j for k in channels for j in range(2)]
    want = conv(conv(conv(x, a[channels]), dw[wide], len(channels)), b[:, wide])
    np.testing.assert_allclose(run(prune(before), x.astype("float32")), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"amount": 1.0}, "the amount to prune must be in [0, 1), not 1.0"),
        ({"amount": -0.1}, "the amount to prune must be in [0, 1), not -0.1"),
        ({"round_to": 0}, "round_to must be at least 1, not 0"),
        ({"minimum": 0}, "minimum must be at least 1, not 0"),
        ({"norm": "l3"}, "norm must be one of 'l1', 'l2', not 'l3'"),
        ({"scope": "all"}, "scope must be one of 'global', 'local', not 'all'"),
    ],
)
def test_prune_raises_when_an_option_is_out_of_range(options: dict, text: str) -> None:
    with pytest.raises(UsageError) as error:
        PruneChannels(**options)
    assert str(error.value) == text


def imported(name: str) -> tvm.IRModule:
    from hone.importer import load

    return FoldBatchNorm()(relax.transform.FoldConstant()(load(models.build(name)).module))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_prune_halves_the_digits_network_when_amount_is_half(scope: str) -> None:
    before = imported("digits-cnn")
    after = PruneChannels(amount=0.5, scope=scope)(before)
    relax.analysis.well_formed(after)
    sizes = [group.size for group in find(after)]
    assert sizes[-1] == 10
    assert sum(sizes[:-1]) == (32 + 64 + 128) // 2
    image = np.random.default_rng(0).random((1, 1, 8, 8), "float32")
    assert run(after, image).shape == (1, 10)


def test_prune_shrinks_every_group_when_resnet18_or_mobilenetv2() -> None:
    for name, groups in (("resnet18", 12), ("mobilenetv2", 25)):
        before = imported(name)
        free = [group for group in find(before) if group.reason_frozen is None]
        assert len(free) == groups
        after = PruneChannels(amount=0.5, round_to=8)(before)
        relax.analysis.well_formed(after)
        halves = [max((group.size + 8) // 16, 1) * 8 for group in free]
        assert [g.size for g in find(after) if g.reason_frozen is None] == halves
