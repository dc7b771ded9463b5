from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from tvm import relax

from hone.passes.distill.legalize_training import LegalizeTraining
from hone.targets.schedule.machine import Machine
from hone.targets.target import resolve

RNG = np.random.default_rng(0)


@dataclass(frozen=True, kw_only=True)
class Convolution:
    id: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1
    packed: bool = True


CASES = [
    Convolution(id="plain", x=(2, 3, 6, 5), w=(4, 3, 3, 2)),
    Convolution(id="padded", x=(2, 3, 6, 5), w=(19, 3, 3, 3), padding=(1, 1, 1, 1)),
    Convolution(id="lopsided", x=(2, 3, 6, 5), w=(4, 3, 3, 3), padding=(0, 1, 2, 1)),
    Convolution(id="strided", x=(2, 3, 7, 6), w=(4, 3, 3, 3), strides=(2, 2), padding=(1,) * 4),
    Convolution(id="pointwise", x=(2, 3, 7, 6), w=(4, 3, 1, 1), strides=(2, 3)),
    Convolution(id="wide-pad", x=(2, 3, 4, 4), w=(4, 3, 1, 1), padding=(1,) * 4, packed=False),
    Convolution(id="depthwise", x=(2, 4, 6, 5), w=(4, 1, 3, 3), groups=4, packed=False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_legalize_gives_tvms_values_and_gradients_when_a_convolution(case: Convolution) -> None:
    x = relax.Var("x", relax.TensorType(case.x, "float32"))
    w = relax.Var("w", relax.TensorType(case.w, "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, w]):
        with builder.dataflow():
            y = builder.emit(
                relax.op.nn.conv2d(
                    x,
                    w,
                    strides=case.strides,
                    padding=case.padding,
                    groups=case.groups,
                )
            )
            factors = RNG.standard_normal([int(extent) for extent in y.ty.shape])
            y = builder.emit(relax.op.multiply(y, relax.const(factors.astype("float32"))))
            gv = builder.emit_output(relax.op.sum(relax.op.multiply(y, y)))
        builder.emit_func_output(gv)
    module = relax.transform.Gradient("main")(builder.get())
    own = LegalizeTraining(Machine.of(resolve("host"), 1))(module)
    names = [str(variable.name_hint) for variable in own.get_global_vars()]
    assert any(name.startswith("pack_turned") for name in names) == case.packed

    arrays = [RNG.standard_normal(shape).astype("float32") for shape in (case.x, case.w)]
    results = []
    for candidate in (own, relax.transform.LegalizeOps()(module)):
        machine = relax.VirtualMachine(tvm.compile(candidate, "llvm"), tvm.cpu())
        value, slopes = machine["main_adjoint"](*[tvm.runtime.tensor(a) for a in arrays])
        results.append([value.numpy(), *(slope.numpy() for slope in slopes)])
    for got, want in zip(*results, strict=True):
        # float32 sums of at most 200 products of size 10, in another order.
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("index", "axis"), [(1, 1), (-1, 2), (0, -3)])
def test_legalize_places_the_gradient_when_one_slice_is_taken(index: int, axis: int) -> None:
    x = relax.Var("x", relax.TensorType((2, 3, 4), "float32"))
    factors = RNG.standard_normal(np.take(np.zeros((2, 3, 4)), index, axis).shape)
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.take(x, relax.const(index, "int64"), axis))
            y = builder.emit(relax.op.multiply(y, relax.const(factors.astype("float32"))))
            gv = builder.emit_output(relax.op.sum(y))
        builder.emit_func_output(gv)
    module = relax.transform.Gradient("main")(builder.get())
    module = LegalizeTraining(Machine.of(resolve("host"), 1))(module)
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    _, (slope,) = machine["main_adjoint"](tvm.runtime.tensor(np.zeros((2, 3, 4), "float32")))
    want = np.zeros((2, 3, 4))
    np.moveaxis(want, axis, 0)[index] = factors
    np.testing.assert_allclose(slope.numpy(), want, rtol=1e-6)
