from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import assert_structural_equal

from hone.errors import ModelError
from hone.passes.apply import apply
from hone.passes.distill.fake_quantize import FakeQuantize, fake_quantize
from hone.passes.quantize.qparams import (
    INT8,
    UINT8,
    PerAxis,
    QParams,
    choose_qparams,
    dequantize,
    quantize,
)
from hone.passes.quantize.quantize_int8 import QuantizedRead


def levels(low: float, high: float) -> QParams:
    return choose_qparams(low, high, type=UINT8, symmetric=False)


def network(*, rounded: QParams | None = None, permuted: bool = False) -> tvm.IRModule:
    """x + (x * w), or the same with the product's x rounded; x [3, 5]."""
    op, builder = relax.op, relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((3, 5), "float32"))
    weight = relax.const(np.arange(1, 16, dtype="float32").reshape(3, 5) / 4)
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(op.nn.relu(x), "relu")
            read = y
            if permuted:
                read = builder.emit(op.permute_dims(y), "layout")
                weight = relax.const(np.arange(1, 16, dtype="float32").reshape(5, 3) / 4)
            if rounded is not None:
                read = builder.emit(fake_quantize(read, rounded), "relu_rounded")
            product = builder.emit(op.multiply(read, weight), "product")
            if permuted:
                product = builder.emit(op.permute_dims(product), "back")
            gv = builder.emit_output(op.add(y, product), "sum")
        builder.emit_func_output(gv)
    return builder.get()


def run(module: tvm.IRModule, *arrays: np.ndarray) -> list[np.ndarray]:
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    result = machine["main"](*[tvm.runtime.tensor(array) for array in arrays])
    return [t.numpy() for t in ([result] if hasattr(result, "numpy") else result)]


def read(qparams: QParams, *, reader: str = "product", tensor: str = "relu") -> QuantizedRead:
    return QuantizedRead(reader=reader, tensor=tensor, qparams=qparams)


@pytest.mark.parametrize("permuted", [False, True], ids=["same layout", "other layout"])
def test_only_the_named_read_is_rounded(permuted: bool, rng) -> None:
    qparams = levels(0.0, 2.0)
    module = network(permuted=permuted)
    result = apply(module, FakeQuantize([read(qparams)]))
    assert_structural_equal(result, network(rounded=qparams, permuted=permuted), map_free_vars=True)
    x = rng.normal(size=(3, 5)).astype("float32") * 2
    y = np.maximum(x, 0)
    weight = np.arange(1, 16, dtype="float32").reshape((5, 3) if permuted else (3, 5)) / 4
    weight = weight.T if permuted else weight
    wanted = y + dequantize(quantize(y, qparams), qparams) * weight
    # One product and one sum, which may be one operation.
    np.testing.assert_allclose(run(result, x)[0], wanted, rtol=1e-6)


def test_nothing_changes_without_reads() -> None:
    module = network()
    assert FakeQuantize([])(module).same_as(module)


def test_reads_that_are_not_there_are_listed() -> None:
    reads = [
        read(levels(0.0, 1.0)),
        read(levels(0.0, 1.0), tensor="x"),
        read(levels(0.0, 1.0), reader="conv"),
    ]
    with pytest.raises(ModelError) as error:
        apply(network(), FakeQuantize(reads))
    assert str(error.value) == (
        "the training view lacks these reads\n  - x by product\n  - relu by conv"
    )


def test_values_and_slopes_are_the_straight_through_estimator(rng) -> None:
    qparams = levels(-1.0, 3.0)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((7, 11), "float32"))
    weight = rng.normal(size=(7, 11)).astype("float32")
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(fake_quantize(x, qparams))
            y = builder.emit(relax.op.multiply(y, relax.const(weight)))
            gv = builder.emit_output(relax.op.sum(y))
        builder.emit_func_output(gv)
    module = relax.transform.Gradient("main")(builder.get())
    functions = {"main": module["main_adjoint"].with_attr("global_symbol", "main")}
    values = (rng.normal(size=(7, 11)) * 3).astype("float32")
    machine = relax.VirtualMachine(tvm.compile(tvm.IRModule(functions), "llvm"), tvm.cpu())
    total, (slope,) = machine["main"](tvm.runtime.tensor(values))
    total, slope = total.numpy(), slope.numpy()
    rounded = dequantize(quantize(values, qparams), qparams)
    np.testing.assert_allclose(total, (rounded * weight).sum(), rtol=1e-4)
    scale, point = float(qparams.scale), int(qparams.zero_point)
    inside = (values >= -point * scale) & (values <= (255 - point) * scale)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(slope, np.where(inside, weight, 0.0))


def test_the_worked_number_is_right() -> None:
    qparams = QParams(
        scale=np.float32(0.5) * np.ones((), np.float32),
        zero_point=np.array(3, np.int32),
        type=UINT8,
        granularity=levels(0.0, 1.0).granularity,
    )
    np.testing.assert_array_equal(
        dequantize(quantize(np.array([1.3, -2.0], np.float32), qparams), qparams), [1.5, -1.5]
    )


def test_error_when_the_tensor_cannot_be_rounded() -> None:
    x = relax.Var("x", relax.TensorType((3, 5), "float16"))
    with pytest.raises(ModelError, match="data must be float32, not"):
        fake_quantize(x, levels(0.0, 1.0))
    per_axis = choose_qparams(
        np.zeros(3), np.ones(3), type=INT8, symmetric=True, granularity=PerAxis(axis=0)
    )
    with pytest.raises(ModelError, match="an activation is quantized per tensor"):
        fake_quantize(relax.Var("x", relax.TensorType((3, 5), "float32")), per_axis)
