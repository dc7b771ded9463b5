"""A layer in another layout keeps its name, not the transposition behind it."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import assert_structural_equal

from hone.passes.apply import apply
from hone.passes.graph.keep_result_names import KeepResultNames, layer_names

SHAPE = (2, 3, 5, 7)


def network(computed: str, moved: str) -> tvm.IRModule:
    """Return the transposition, called ``moved``, of a layer called ``computed``."""
    x = relax.Var("x", relax.TensorType(SHAPE, "float32"))
    value = relax.BlockBuilder()
    inner = relax.DataflowVar(computed, relax.TensorType(SHAPE, "float32"))
    result = relax.Var(moved, relax.TensorType((2, 7, 3, 5), "float32"))
    bindings = [
        relax.VarBinding(inner, value.normalize(relax.op.nn.relu(x))),
        relax.VarBinding(result, value.normalize(relax.op.permute_dims(inner, [0, 3, 1, 2]))),
    ]
    body = value.normalize(relax.SeqExpr([relax.DataflowBlock(bindings)], result))
    return tvm.IRModule({"main": relax.Function([x], body, result.ty)})


def names(module: tvm.IRModule) -> list[str]:
    return [str(binding.var.name) for binding in module["main"].body.blocks[0].bindings]


def test_layer_and_transposition_swap_names_when_the_transposition_took_the_layers() -> None:
    before = network("lv", "layer")
    after = apply(before, KeepResultNames({"layer"}))
    assert names(after) == ["layer", "lv"]
    assert_structural_equal(after, before)


def test_names_stay_when_the_transposition_is_a_layer() -> None:
    before = network("lv", "transpose")
    assert layer_names(before["main"]) == {"lv"}
    assert names(apply(before, KeepResultNames({"lv"}))) == ["lv", "transpose"]


def test_names_stay_when_both_were_there_before() -> None:
    before = network("relu", "permuted")
    after = apply(before, KeepResultNames({"relu", "permuted"}))
    assert names(after) == ["relu", "permuted"]
