from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax

from hone.errors import ModelError
from hone.passes.prune.channel_groups import ChannelGroup, find

RNG = np.random.default_rng(0)


class Net:
    """Builds ``main`` from an input of a shape, naming every binding."""

    def __init__(self, *shape: int) -> None:
        self.x = relax.Var("x", relax.TensorType(shape, "float32"))
        self._builder = relax.BlockBuilder()
        self._bindings: list[relax.VarBinding] = []

    def __call__(self, name: str, value: relax.Expr) -> relax.Var:
        value = self._builder.normalize(value)
        var = relax.DataflowVar(name, value.ty)
        self._bindings.append(relax.VarBinding(var, value))
        return var

    def conv(self, name: str, x: relax.Var, channels: int, **options: int) -> relax.Var:
        inputs = int(x.ty.shape[1]) // options.get("groups", 1)
        return self(name, relax.op.nn.conv2d(x, weight(channels, inputs, 1, 1), **options))

    def module(self, *results: relax.Var) -> tvm.IRModule:
        value = relax.Tuple(results) if len(results) > 1 else results[0]
        value = self._builder.normalize(value)
        output = relax.Var("gv", value.ty)
        bindings = [*self._bindings, relax.VarBinding(output, value)]
        body = self._builder.normalize(relax.SeqExpr([relax.DataflowBlock(bindings)], output))
        function = relax.Function([self.x], body, body.ty)
        return tvm.IRModule({"main": function.with_attr("global_symbol", "main")})


def weight(*shape: int) -> relax.Expr:
    return relax.const(RNG.standard_normal(shape).astype("float32"))


def group(module: tvm.IRModule, producer: str) -> ChannelGroup:
    (found,) = [g for g in find(module) if producer in g.producers]
    return found


def test_find_couples_what_a_chain_shares_when_nothing_is_frozen() -> None:
    net = Net(1, 3, 6, 6)
    y = net("conv1", relax.op.add(net.conv("conv1@conv2d", net.x, 4), weight(1, 4, 1, 1)))
    y = net("bn@batch_norm", relax.op.nn.batch_norm(y, *[weight(4)] * 4, axis=1, training=False))
    y = net("clip", relax.op.clip(net("bn", relax.TupleGetItem(y, 0)), 0, 6))
    y = net("dw", relax.op.nn.conv2d(y, weight(4, 1, 3, 3), groups=4))
    y = net("pool", relax.op.nn.max_pool2d(y, [2, 2], [2, 2]))
    y = net("flat", relax.op.reshape(y, (1, 16)))
    module = net.module(net("fc", relax.op.matmul(y, weight(16, 5))))
    assert find(module) == (
        ChannelGroup(
            producers=("conv1",),
            coupled=("dw", "bn"),
            consumers=("fc",),
            size=4,
            reason_frozen=None,
            channels=-1,
        ),
        ChannelGroup(
            producers=("fc",),
            coupled=(),
            consumers=(),
            size=5,
            reason_frozen="the channels are an output of the network",
            channels=-1,
        ),
    )


def test_find_unites_branches_when_they_meet_in_a_residual_add() -> None:
    net = Net(1, 3, 4, 4)
    a = net.conv("a", net.x, 6)
    b = net("relu", relax.op.nn.relu(net.conv("b", a, 6)))
    c = net("sum", relax.op.add(a, b))
    module = net.module(net.conv("c", c, 2))
    shared = group(module, "a")
    assert shared.producers == ("a", "b")
    assert shared.consumers == ("b", "c")
    assert shared.reason_frozen is None


def test_find_unites_gate_and_gated_when_squeeze_and_excite() -> None:
    net = Net(1, 3, 4, 4)
    a = net.conv("a", net.x, 6)
    mean = net("mean", relax.op.mean(a, [2, 3], keepdims=True))
    squeezed = net.conv("squeeze", mean, 2)
    gate = net("gate", relax.op.sigmoid(net.conv("excite", squeezed, 6)))
    module = net.module(net.conv("out", net("scale", relax.op.multiply(a, gate)), 2))
    assert group(module, "a").producers == ("a", "excite")
    assert group(module, "squeeze").reason_frozen is None


def test_find_keeps_groups_apart_when_they_are_concatenated() -> None:
    net = Net(1, 3, 4, 4)
    a, b = net.conv("a", net.x, 2), net.conv("b", net.x, 5)
    joined = net("cat", relax.op.concat([a, b, net.x], axis=1))
    module = net.module(net.conv("out", joined, 2))
    for name, size in (("a", 2), ("b", 5)):
        found = group(module, name)
        assert (found.size, found.consumers, found.reason_frozen) == (size, ("out",), None)


def test_find_follows_the_hidden_layer_when_a_transformer_mlp() -> None:
    net = Net(1, 5, 6)
    y = net("norm", relax.op.nn.layer_norm(net.x, weight(6), weight(6), axes=[-1]))
    y = net("up", relax.op.add(net("up@matmul", relax.op.matmul(y, weight(6, 12))), weight(12)))
    y = net("down", relax.op.matmul(net("gelu", relax.op.nn.gelu(y)), weight(12, 6)))
    module = net.module(net("sum", relax.op.add(net.x, y)))
    assert group(module, "up").reason_frozen is None
    assert group(module, "up").consumers == ("down",)
    assert group(module, "down").reason_frozen == (
        "the channels reach 'sum': they meet a tensor of unknown channels"
    )


def attention(net: Net, y: relax.Var) -> relax.Var:
    y = net("rows", relax.op.permute_dims(net("tokens", relax.op.reshape(y, (1, 6, 4))), [0, 2, 1]))
    return net("scores", relax.op.matmul(y, net("t", relax.op.permute_dims(y, [0, 2, 1]))))


def split_heads(net: Net, y: relax.Var) -> relax.Var:
    return net("heads", relax.op.reshape(y, (1, 2, 3, 4)))


def grouped(net: Net, y: relax.Var) -> relax.Var:
    return net.conv("grouped", y, 4, groups=2)


def channel_mean(net: Net, y: relax.Var) -> relax.Var:
    return net("mean", relax.op.mean(y, [1]))


def channel_softmax(net: Net, y: relax.Var) -> relax.Var:
    return net("softmax", relax.op.nn.softmax(y, axis=1))


def group_norm(net: Net, y: relax.Var) -> relax.Var:
    value = relax.op.nn.group_norm(y, weight(6), weight(6), 2, channel_axis=1, axes=[2, 3])
    return net("group_norm", value)


def split(net: Net, y: relax.Var) -> relax.Var:
    parts = net("split@split", relax.op.split(y, 2, axis=1))
    return net("split", relax.TupleGetItem(parts, 0))


def other_axis(net: Net, y: relax.Var) -> relax.Var:
    return net("fc", relax.op.matmul(y, weight(2, 3)))


def batch_norm_of_rows(net: Net, y: relax.Var) -> relax.Var:
    norm = relax.op.nn.batch_norm(y, *[weight(2)] * 4, axis=2, training=False)
    return net("bn", relax.TupleGetItem(net("bn@batch_norm", norm), 0))


def meets_input(net: Net, y: relax.Var) -> relax.Var:
    wide = net("wide", relax.op.concat([net.x, net.x], axis=1))
    return net("sum", relax.op.add(y, wide))


def padded(net: Net, y: relax.Var) -> relax.Var:
    return net("pad", relax.op.nn.pad(y, [0, 0, 1, 1, 0, 0, 0, 0]))


def concat_rows(net: Net, y: relax.Var) -> relax.Var:
    return net("cat", relax.op.concat([y, y], axis=2))


def composed_differently(net: Net, y: relax.Var) -> relax.Var:
    joined = net("cat", relax.op.concat([net.conv("p", net.x, 2), net.conv("q", net.x, 4)], axis=1))
    return net("sum", relax.op.add(y, joined))


FROZEN: list[tuple[Callable[[Net, relax.Var], relax.Var], str]] = [
    (attention, "'scores': it has no constant weight of two axes"),
    (split_heads, "'heads': it splits or moves them, [1, 6, 2, 2] → [1, 2, 3, 4]"),
    (grouped, "'grouped': it has 2 groups"),
    (channel_mean, "'mean': it reduces over them"),
    (channel_softmax, "'softmax': it normalizes over them"),
    (group_norm, "'group_norm': relax.nn.group_norm is not followed"),
    (split, "'split': relax.split is not followed"),
    (other_axis, "'fc': it reads them along another axis"),
    (batch_norm_of_rows, "'bn': it reads them along another axis"),
    (meets_input, "'sum': they meet a tensor of unknown channels"),
    (padded, "'pad': it pads them"),
    (concat_rows, "'cat': it concatenates along another axis"),
]


@pytest.mark.parametrize(
    ("tail", "reason"), FROZEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_find_freezes_with_the_reason_when_channels_cannot_be_followed(
    tail: Callable[[Net, relax.Var], relax.Var], reason: str
) -> None:
    net = Net(1, 3, 2, 2)
    y = tail(net, net.conv("conv", net.x, 6))
    module = net.module(net("last", relax.op.mean(y)))
    assert group(module, "conv").reason_frozen == f"the channels reach {reason}"


def test_find_freezes_both_sides_when_they_are_composed_differently() -> None:
    net = Net(1, 3, 2, 2)
    y = composed_differently(net, net.conv("conv", net.x, 6))
    module = net.module(net.conv("out", y, 2))
    for name in ("conv", "p", "q"):
        assert group(module, name).reason_frozen == (
            "the channels meet others, composed differently, in 'sum'"
        )


def test_find_freezes_the_depthwise_layer_when_its_input_is_the_networks() -> None:
    net = Net(1, 3, 2, 2)
    y = net("dw", relax.op.nn.conv2d(net.x, weight(3, 1, 1, 1), groups=3))
    module = net.module(net.conv("out", y, 2))
    assert group(module, "dw").reason_frozen == (
        "'dw' is depthwise over channels that are not followed"
    )


def test_find_freezes_when_one_use_of_several_is_an_output() -> None:
    net = Net(1, 3, 2, 2)
    y = net.conv("conv", net.x, 6)
    module = net.module(net.conv("out", y, 2), net("relu", relax.op.nn.relu(y)))
    assert group(module, "conv").reason_frozen == "the channels are an output of the network"


def test_find_follows_the_layout_when_convolutions_are_nhwc() -> None:
    net = Net(1, 5, 4, 3)
    layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI"}
    y = net("a", relax.op.nn.conv2d(net.x, weight(6, 1, 1, 3), **layouts))
    y = net("pool", relax.op.nn.avg_pool2d(y, [2, 2], [2, 2], layout="NHWC"))
    module = net.module(net("b", relax.op.nn.conv2d(y, weight(2, 1, 1, 6), **layouts)))
    assert group(module, "a").consumers == ("b",)
    assert group(module, "a").reason_frozen is None


def test_find_raises_when_the_function_is_not_one_dataflow_block() -> None:
    x = relax.Var("x", relax.TensorType((1, 2), "float32"))
    function = relax.Function([x], relax.SeqExpr([], x), x.ty)
    with pytest.raises(ModelError) as error:
        find(tvm.IRModule({"main": function}))
    assert str(error.value) == (
        "a function of exactly one dataflow block is required\n"
        "  hint: the module must come from hone's importer"
    )
