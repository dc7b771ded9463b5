from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from hone.distillation import Distillation
from hone.errors import ModelError, UsageError
from hone.passes.apply import apply
from hone.passes.distill.lift_constants import BindConstants, LiftConstants, trainable_constants
from hone.passes.distill.weight_grid import FixedGrid, project
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.quantize.observer import Range
from hone.passes.quantize.quantize_int8 import observed_tensors, quantize_int8, quantized_reads
from hone.passes.quantize.weight_schemes import Scheme, WeightOptions
from hone.recover_quantized import check_stages, distill_quantized

LAYERS = ("conv", "fc")
INT3 = WeightOptions(bits=3)


def network(seed: int) -> tvm.IRModule:
    """Convolution, ReLU, mean, product: [1, 2, 5, 4] → [1, 3]."""
    rng = np.random.default_rng(seed)

    def const(*shape: int) -> relax.Expr:
        return relax.const(rng.standard_normal(shape).astype("float32"))

    op, builder = relax.op, relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 2, 5, 4), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(op.nn.conv2d(x, const(6, 2, 3, 3), padding=1), "conv")
            y = builder.emit(op.add(y, const(1, 6, 1, 1)), "conv@bias")
            y = builder.emit(op.nn.relu(y), "relu")
            y = builder.emit(op.mean(y, [2, 3]), "mean")
            gv = builder.emit_output(op.matmul(y, const(6, 3)), "fc")
        builder.emit_func_output(gv)
    return builder.get()


def samples(count: int = 24) -> dict[str, np.ndarray]:
    x = np.random.default_rng(7).standard_normal((count, 1, 2, 5, 4)).astype("float32")
    return {"x": x}


def run(module: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    return np.stack([machine["main"](tvm.runtime.tensor(row)).numpy() for row in x])


def recover(**options):
    module = network(1)
    defaults = {"epochs": 24, "batch": 8, "learning_rate": 0.01, "mix": 0.0, "weights": INT3}
    return distill_quantized(module, module, samples(), layers=LAYERS, **{**defaults, **options})


def weights(module: tvm.IRModule) -> dict[str, np.ndarray]:
    return {constant.name: constant.value for constant in trainable_constants(module)}


def with_weights(module: tvm.IRModule, values: dict[str, np.ndarray]) -> tvm.IRModule:
    return apply(module, LiftConstants(names=values.keys()), BindConstants(values))


def quantized(module: tvm.IRModule, options: WeightOptions) -> tvm.IRModule:
    values = weights(module)
    names = [name for name in values if name.endswith(".weight")]
    return with_weights(module, {name: project(values[name], options) for name in names})


@pytest.mark.parametrize(
    "stages",
    [{}, {"progressive": [8, 4, 3]}, {"freeze": [0.5, 0.8, 1.0]}],
    ids=["at once", "progressive", "freeze"],
)
def test_quantized_weights_answer_more_like_the_teacher(stages) -> None:
    result = recover(**stages)
    assert result.notes == ()
    assert result.steps == 24 * 3
    assert result.loss_after < 0.5 * result.loss_before
    # The loss is that of the network once it is quantized.
    x = samples()["x"]
    wanted, plain, found = (
        run(m, x) for m in (network(1), quantized(network(1), INT3), quantized(result.module, INT3))
    )
    assert np.square(found - wanted).mean() < 0.5 * np.square(plain - wanted).mean()


def test_frozen_weights_are_on_the_grid_at_the_end() -> None:
    before, after = weights(network(1)), weights(recover(freeze=[0.5, 1.0]).module)
    for name in ("conv.weight", "fc.weight"):
        grid = FixedGrid.of(before[name], INT3)
        np.testing.assert_allclose(grid.nearest(after[name]), after[name], rtol=1e-6)
        np.testing.assert_allclose(project(after[name], INT3), after[name], rtol=1e-5)
    assert (before["conv.bias"] != after["conv.bias"]).any()


def test_only_the_named_layers_are_quantized() -> None:
    module = network(1)
    result = distill_quantized(
        module, module, samples(), layers=["fc"], weights=INT3, freeze=[1.0], epochs=1, batch=8
    )
    after = weights(result.module)
    np.testing.assert_allclose(project(after["fc.weight"], INT3), after["fc.weight"], rtol=1e-5)
    conv = after["conv.weight"]
    assert np.abs(project(conv, INT3) - conv).max() > 0.05


def test_a_student_in_nhwc_is_trained_like_one_in_nchw() -> None:
    module = network(1)
    first, second = (
        distill_quantized(
            student, module, samples(), layers=LAYERS, weights=INT3, epochs=2, batch=8
        )
        for student in (module, apply(module, ToNHWC()))
    )
    assert first.losses == second.losses
    for name, value in weights(first.module).items():
        moved = value.transpose(0, 2, 3, 1) if value.ndim == 4 else value
        np.testing.assert_array_equal(weights(second.module)[name], moved)


def test_training_sees_the_integers_that_quantization_makes() -> None:
    module = apply(network(1), ToNHWC())
    x = samples()
    ranges = {name: Range(minimum=-2.0, maximum=3.0) for name in observed_tensors(module)}
    reads = quantized_reads(module, ranges)
    assert [(read.reader, read.tensor) for read in reads][-1] == ("fc", "mean")
    run_ = Distillation(module, module, x, batch=8, mix=0.0, reads=reads)
    rounded = run_.loss()
    run_.trainer.project = lambda name, value: (
        project(value, WeightOptions()) if name.endswith("weight") else value
    )
    whole = run_.loss()
    assert rounded > 0.0
    assert rounded != whole
    # By hand: the integer module's answers, in the loss of the training.
    integers = quantize_int8(module, ranges).module
    wanted, found = run(module, x["x"])[:, 0], run(integers, x["x"])[:, 0]

    def log_softmax(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float64) / 2.0
        return values - np.log(np.exp(values).sum(1, keepdims=True))

    teacher, student = log_softmax(wanted), log_softmax(found)
    by_hand = 4.0 * (np.exp(teacher) * (teacher - student)).sum(1).mean()
    # The integer bias is rounded as well, and ties of a sum may fall elsewhere.
    assert whole == pytest.approx(by_hand, rel=0.05)


def test_weights_stay_when_training_raises_the_loss() -> None:
    result = recover(learning_rate=1e30, epochs=2)
    assert result.loss_after == result.loss_before
    assert "the weights stay as they were" in result.notes[0]
    for name, value in weights(network(1)).items():
        np.testing.assert_array_equal(weights(result.module)[name], value)


def test_a_time_limit_leaves_every_stage_an_epoch() -> None:
    result = recover(progressive=[8, 3], epochs=50, time_limit_s=1e-3)
    assert len(result.losses) == 2
    assert result.notes[0] == "the time limit of 0.001 s ended the training after 2 of 50 epochs"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"progressive": [4, 3], "freeze": [1.0]},
            "progressive and freeze are two ways to one end: give one of them",
        ),
        (
            {"progressive": [4, 8, 3]},
            "progressive needs falling bits that end with 3, not [4, 8, 3]",
        ),
        ({"progressive": [8, 4]}, "progressive needs falling bits that end with 3, not [8, 4]"),
        ({"freeze": [0.5]}, "freeze needs rising fractions above 0 that end with 1, not [0.5]"),
        (
            {"freeze": [0.0, 1.0]},
            "freeze needs rising fractions above 0 that end with 1, not [0.0, 1.0]",
        ),
        (
            {"freeze": [0.5, 0.5, 1.0]},
            "freeze needs rising fractions above 0 that end with 1, not [0.5, 0.5, 1.0]",
        ),
    ],
)
def test_stages_that_lead_elsewhere_are_refused(options, text: str) -> None:
    with pytest.raises(UsageError) as error:
        check_stages(INT3, **{"progressive": (), "freeze": (), **options})
    assert str(error.value) == text


def test_more_stages_than_epochs_and_layers_without_weights_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^3 stages need at least 3 epochs, not 2$"):
        recover(progressive=[8, 4, 3], epochs=2)
    with pytest.raises(UsageError, match=r"^progressive lowers the bits of integers, binary has"):
        check_stages(WeightOptions(scheme=Scheme.BINARY), (8, 4), ())
    module = network(1)
    with pytest.raises(ModelError, match=r"^no layer has a weight that is both quantized and"):
        distill_quantized(module, module, samples(), layers=["relu"], weights=INT3)
