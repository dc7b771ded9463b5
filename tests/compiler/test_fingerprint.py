"""Hashes of modules: what makes two of them one key of a cache."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from hone import fingerprint
from hone.passes.apply import apply
from hone.passes.graph.to_half import ToHalf


def network(value: float = 1.0) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 8, 8, 4), "float32"))
    weight = relax.const(np.full((4, 3, 3, 4), value, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = relax.op.nn.conv2d(x, weight, data_layout="NHWC", kernel_layout="OHWI")
            y = builder.emit_output(y)
        builder.emit_func_output(y)
    return builder.get()


def test_modules_built_apart_are_the_same() -> None:
    assert fingerprint.of_module(network()) == fingerprint.of_module(network())


def test_weights_count() -> None:
    assert fingerprint.of_module(network()) != fingerprint.of_module(network(2.0))


def test_notes_of_passes_on_the_function_count_and_not_their_order() -> None:
    half, large = (apply(network(), ToHalf(large_tiles=large)) for large in (False, True))
    assert fingerprint.of_module(half) != fingerprint.of_module(large)

    def noted(*names: str) -> tvm.IRModule:
        function = network()["main"]
        for name in names:
            function = function.with_attr(name, 1)
        return tvm.IRModule({"main": function})

    assert fingerprint.of_module(noted("a", "b")) == fingerprint.of_module(noted("b", "a"))
    assert fingerprint.of_module(noted("a")) != fingerprint.of_module(noted("b"))
