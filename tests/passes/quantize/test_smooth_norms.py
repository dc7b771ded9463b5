from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import assert_structural_equal

from hone.errors import ModelError
from hone.passes.graph.dataflow import Dataflow
from hone.passes.quantize import legalize as legalize  # registers how integers are lowered
from hone.passes.quantize.observer import Range
from hone.passes.quantize.quantize_int8 import observed_tensors, quantize_int8
from hone.passes.quantize.smooth_norms import smooth_norms, smoothed_tensors

SHAPE = (1, 5, 4)
GAIN = np.array([64.0, 1.0, 0.5, 2.0], np.float32)
SHIFT = np.array([8.0, -0.5, 0.25, 0.0], np.float32)


def network(
    *,
    gain: np.ndarray = GAIN,
    shift: np.ndarray = SHIFT,
    factor: np.ndarray | None = None,
    between: np.ndarray | None = None,
    residual: bool = False,
    axes: int = -1,
) -> tvm.IRModule:
    """LayerNorm, two products of it, their sum, and the norm itself where ``residual``."""
    rng = np.random.default_rng(3)
    first, second = (rng.normal(size=(4, width)).astype(np.float32) for width in (6, 6))
    if factor is not None:
        first, second = first * factor[:, None], second * factor[:, None]
    op, builder = relax.op, relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(SHAPE, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            gains = relax.const(gain), relax.const(shift)
            norm = builder.emit(op.nn.layer_norm(x, *gains, axes=axes), "norm")
            read = norm
            if between is not None:
                read = builder.emit(op.multiply(norm, relax.const(between)), "norm@smooth")
            a = builder.emit(op.matmul(read, relax.const(first)), "query")
            b = builder.emit(op.matmul(read, relax.const(second)), "key")
            gv = builder.emit(op.add(op.nn.relu(a), op.nn.relu(b)), "sum")
            if residual:
                gv = op.concat([gv, norm], 2)
            gv = builder.emit_output(gv, "y")
        builder.emit_func_output(gv)
    return builder.get()


def run(module: tvm.IRModule, *rows: np.ndarray) -> np.ndarray:
    lowered = tvm.transform.Sequential([relax.transform.LegalizeOps()])(module)
    machine = relax.VirtualMachine(tvm.compile(lowered, tvm.target.Target("llvm")), tvm.cpu())
    return np.stack([machine["main"](tvm.runtime.tensor(row)).numpy() for row in rows])


def ranges(values: list[float], name: str = "norm") -> dict[str, tuple[Range, ...]]:
    return {name: tuple(Range(minimum=-abs(v), maximum=v / 2) for v in values)}


def weights_of(module: tvm.IRModule) -> np.ndarray:
    graph = Dataflow(module["main"])
    calls = {str(var.name): graph.call(var) for var in graph.definition}
    both = [np.abs(calls[name].args[1].value.numpy()).max(1) for name in ("query", "key")]
    return np.max(both, axis=0)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("residual", [False, True], ids=["folded", "multiplied"])
def test_channels_are_scaled_as_the_formula_says(alpha: float, residual: bool, rng) -> None:
    module = network(residual=residual)
    extremes = [70.0, 3.0, 0.6, 5.0]
    reading = weights_of(module)
    wanted = np.array(extremes) ** alpha / reading ** (1 - alpha)
    exponent = np.log2(wanted) - np.median(np.log2(wanted))
    factor = np.exp2(np.rint(exponent)).astype(np.float32)
    assert (factor != 1.0).any()
    result = smooth_norms(module, ranges(extremes), alpha=alpha)
    assert result.pairs == (("norm", "query"), ("norm", "key"))
    if residual:
        expected = network(factor=factor, between=1 / factor, residual=True)
    else:
        expected = network(gain=GAIN / factor, shift=SHIFT / factor, factor=factor)
    assert_structural_equal(result.module, expected, map_free_vars=True)
    x = rng.normal(size=SHAPE).astype(np.float32)
    np.testing.assert_array_equal(run(result.module, x), run(module, x))


def test_the_worked_number_is_right() -> None:
    op, builder = relax.op, relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 2, 3), "float32"))
    gains = relax.const(np.ones(3, np.float32)), relax.const(np.zeros(3, np.float32))
    with builder.function("main", [x]):
        with builder.dataflow():
            norm = builder.emit(op.nn.layer_norm(x, *gains, axes=-1), "norm")
            gv = builder.emit_output(op.matmul(norm, relax.const(np.ones((3, 2), np.float32))))
        builder.emit_func_output(gv)
    result = smooth_norms(builder.get(), ranges([64.0, 1.0, 1.0]))
    norm, product = (binding.value for binding in Dataflow(result.module["main"]).bindings)
    np.testing.assert_array_equal(norm.args[1].value.numpy(), [1 / 8, 1.0, 1.0])
    np.testing.assert_array_equal(product.args[1].value.numpy()[:, 0], [8.0, 1.0, 1.0])


def test_integers_are_nearer_to_float_when_outliers_are_smoothed(rng) -> None:
    module = network()
    x = rng.normal(size=(40, *SHAPE)).astype(np.float32)
    wanted = run(module, *x)

    def normalized(values: np.ndarray) -> np.ndarray:
        centred = values - values.mean(-1, keepdims=True)
        return centred / np.sqrt(values.var(-1, keepdims=True) + 1e-5) * GAIN + SHIFT

    def error(smoothed: tvm.IRModule, reach: np.ndarray) -> float:
        bounds = {
            name: Range(minimum=-float(reach.max()), maximum=float(reach.max()))
            for name in observed_tensors(smoothed)
        }
        integers = quantize_int8(smoothed, bounds).module
        found = run(integers, *x)
        return float(np.square(found - wanted).mean())

    seen = np.abs(normalized(x)).reshape(-1, 4).max(0)
    result = smooth_norms(module, ranges(list(seen)))
    graph = Dataflow(result.module["main"])
    gain = next(iter(graph.bindings)).value.args[1].value.numpy()
    assert error(result.module, seen * gain / GAIN) < 0.3 * error(module, seen)


@pytest.mark.parametrize(
    ("module", "extremes"),
    [
        (network(), [0.0, 0.0, 0.0, 0.0]),
        (
            network(
                axes=[-2, -1], gain=np.ones((5, 4), np.float32), shift=np.ones((5, 4), np.float32)
            ),
            [],
        ),
    ],
    ids=["nothing seen", "normalized over more than channels"],
)
def test_nothing_changes_where_there_is_nothing_to_scale(module, extremes) -> None:
    result = smooth_norms(module, ranges(extremes))
    assert result.module.same_as(module)
    assert result.pairs == ()


def test_missing_ranges_are_listed() -> None:
    assert smoothed_tensors(network()) == ("norm",)
    with pytest.raises(ModelError) as error:
        smooth_norms(network(), {})
    assert str(error.value) == "calibration gave no range for some tensors\n  - norm"
