"""A small result is not computed again for every element of a large one."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from hone import pipeline
from hone.passes.apply import apply
from hone.passes.lower.fuse_operators import FuseOperators, kernel_layers
from hone.passes.lower.separate_broadcasts import RemoveSeparations, SeparateBroadcasts
from hone.targets.target import resolve


def gated(gate_shape: tuple[int, ...], *, computed: bool = True) -> tvm.IRModule:
    """``x * sigmoid(gate)`` with a gate that is computed here, or given by the caller."""
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 5, 7, 3), "float32"))
    gate = relax.Var("gate", relax.TensorType(gate_shape, "float32"))
    with block.function("main", [x, gate]):
        with block.dataflow():
            operand = block.emit(relax.op.sigmoid(gate), "sigmoid") if computed else gate
            result = block.emit_output(relax.op.multiply(x, operand), "scaled")
        block.emit_func_output(result)
    return apply(block.get(), relax.transform.LegalizeOps(), relax.transform.AnnotateTIROpPattern())


def test_an_identity_stands_behind_the_repeated_operand_only():
    main = SeparateBroadcasts()(gated((2, 1, 1, 3)))["main"]
    sigmoid, once, scaled = main.body.blocks[0].bindings
    assert once.var.name == "sigmoid@once"
    assert once.value.op == tvm.ir.Op.get("relax.builtin.stop_lift_params")
    assert once.value.args[0].same_as(sigmoid.var)
    assert [a.name for a in scaled.value.args[1].fields] == ["x", "sigmoid@once"]


@pytest.mark.parametrize(
    "module", [gated((2, 5, 7, 3)), gated((2, 1, 1, 3), computed=False)], ids=["same", "given"]
)
def test_nothing_changes_when_no_computed_operand_is_repeated(module):
    assert SeparateBroadcasts()(module).same_as(module)
    assert RemoveSeparations()(module).same_as(module)


def test_removing_restores_the_module():
    module = gated((2, 1, 1, 3))
    restored = apply(module, SeparateBroadcasts(), RemoveSeparations())
    tvm.ir.assert_structural_equal(restored, module)


def test_the_gate_is_a_kernel_of_its_own_and_the_product_another():
    table = kernel_layers(FuseOperators()(gated((2, 1, 1, 3))))
    assert sorted(table.values()) == [("scaled",), ("sigmoid",)]
    together = kernel_layers(FuseOperators()(gated((2, 5, 7, 3))))
    assert list(together.values()) == [("sigmoid", "scaled")]


def test_squeeze_and_excitation_equals_numpy():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 4, 1, 1), dtype=np.float32)
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3, 13, 11), "float32"))
    s = relax.Var("s", relax.TensorType((1, 4, 1, 1), "float32"))
    with block.function("main", [x, s]):
        with block.dataflow():
            gate = block.emit(relax.op.sigmoid(relax.op.nn.conv2d(s, relax.const(weight))))
            result = block.emit_output(relax.op.multiply(x, gate))
        block.emit_func_output(result)
    target = resolve("host")
    lowered = pipeline.lower(block.get(), target, threads=1)
    scheduled = pipeline.schedule(lowered, target, threads=1).module
    vm = relax.VirtualMachine(pipeline.build_executable(scheduled, target, threads=1), tvm.cpu())
    a = rng.standard_normal((1, 3, 13, 11), dtype=np.float32)
    b = rng.standard_normal((1, 4, 1, 1), dtype=np.float32)
    found = vm["main"](tvm.runtime.tensor(a), tvm.runtime.tensor(b)).numpy()
    gate_ = 1 / (1 + np.exp(-np.einsum("kc,c->k", weight[..., 0, 0], b[0, :, 0, 0])))
    # The polynomial of exp is within 3e-7 of it.
    np.testing.assert_allclose(found, a * gate_[None, :, None, None], rtol=1e-5, atol=1e-6)
