from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import assert_structural_equal

from hone.distillation import RecoverResult, mixed, schedule
from hone.errors import ModelError, UsageError
from hone.importer import load
from hone.passes.distill.lift_constants import trainable_constants
from hone.passes.graph.fold_batch_norm import FoldBatchNorm
from hone.passes.graph.rebatch import Rebatch
from hone.passes.prune.prune_channels import PruneChannels
from hone.recover import distill


def network(
    seed: int, *, batch: int = 1, hidden: int = 6, ending: str = "logits", channels: int = 2
) -> tvm.IRModule:
    """Convolution, clip, mean, linear: [batch, channels, 5, 4] → [batch, 3] and more."""
    rng = np.random.default_rng(seed)

    def const(*shape: int) -> relax.Expr:
        return relax.const(rng.standard_normal(shape).astype("float32"))

    op, builder = relax.op, relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((batch, channels, 5, 4), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(op.nn.conv2d(x, const(hidden, channels, 3, 3), padding=1), "conv")
            y = builder.emit(op.add(y, const(1, hidden, 1, 1)), "bias")
            features = builder.emit(op.clip(y, 0.0, 6.0), "clip")
            y = builder.emit(op.mean(features, [2, 3]), "mean")
            y = builder.emit(op.matmul(y, const(hidden, 3)), "fc")
            if ending == "softmax":
                y = builder.emit(op.nn.softmax(y), "softmax")
            elif ending == "round":
                y = builder.emit(op.round(y), "round")
            elif ending == "several":
                y = relax.Tuple([y, builder.emit(op.mean(features, [1]), "map")])
            gv = builder.emit_output(y, "gv")
        builder.emit_func_output(gv)
    return builder.get()


def samples(count: int, *, batch: int = 1, seed: int = 7) -> dict[str, np.ndarray]:
    shape = (count, batch, 2, 5, 4)
    return {"x": np.random.default_rng(seed).standard_normal(shape).astype("float32")}


def run(module: tvm.IRModule, x: np.ndarray) -> list[np.ndarray]:
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    result = machine["main"](tvm.runtime.tensor(x))
    return [t.numpy() for t in ([result] if hasattr(result, "numpy") else result)]


def weights(result: RecoverResult) -> list[np.ndarray]:
    return [constant.value for constant in trainable_constants(result.module)]


def test_distill_recovers_the_digits_network_when_half_of_its_channels_are_removed() -> None:
    folder = files("hone.models") / "digits"
    teacher = FoldBatchNorm()(load(str(folder / "digits.onnx")).module)
    student = PruneChannels(amount=0.5)(teacher)
    calibration = np.load(str(folder / "calibration.npz"))["image"]
    evaluation = np.load(str(folder / "evaluation.npz"))
    result = distill(student, teacher, {"image": calibration[:, None]}, epochs=40, threads=2)

    def top1(module: tvm.IRModule) -> float:
        (logits,) = run(Rebatch(len(evaluation["image"]))(module), evaluation["image"])
        return float(np.mean(logits.argmax(1) == evaluation["labels"]))

    assert top1(student) < 0.9
    assert top1(result.module) >= top1(teacher) - 0.005
    assert len(result.losses) == 40
    assert result.steps == 40 * (len(calibration) // 32)
    assert result.loss_after < 0.05 * result.loss_before
    assert result.notes == ()


def test_distill_is_bit_identical_when_seed_and_threads_are_the_same() -> None:
    options = {"epochs": 2, "batch": 4, "threads": 2}
    runs = [
        distill(network(1), network(2), samples(12), seed=seed, **options) for seed in (3, 3, 4)
    ]
    for a, b in zip(weights(runs[0]), weights(runs[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert runs[0].losses == runs[1].losses
    assert any((a != b).any() for a, b in zip(weights(runs[0]), weights(runs[2]), strict=True))


def test_distill_changes_only_the_weights_when_the_student_is_returned() -> None:
    student = network(1)
    before = student.script(show_meta=True)
    result = distill(student, network(2), samples(8), epochs=1, batch=4)
    assert student.script(show_meta=True) == before
    assert result.module.script().replace(" ", "") == student.script().replace(" ", "")


def test_distill_uses_squared_error_when_an_output_is_not_classes() -> None:
    student, teacher = network(1, ending="several"), network(2, ending="several")
    result = distill(student, teacher, samples(16), epochs=30, batch=8, learning_rate=0.03, mix=0.0)
    assert result.notes == ("'map' of shape [5, 4] is trained by squared error",)
    assert result.loss_after < 0.2 * result.loss_before


def test_distill_compares_logits_when_a_softmax_ends_the_network() -> None:
    options = {"epochs": 2, "batch": 4}
    plain = distill(network(1), network(2), samples(8), **options)
    soft = distill(
        network(1, ending="softmax"), network(2, ending="softmax"), samples(8), **options
    )
    for a, b in zip(weights(plain), weights(soft), strict=True):
        np.testing.assert_array_equal(a, b)
    (probabilities,) = run(soft.module, samples(1)["x"][0])
    np.testing.assert_allclose(probabilities.sum(), 1.0, rtol=1e-6)


def test_distill_groups_samples_when_the_model_has_a_batch_of_its_own() -> None:
    result = distill(
        network(1, batch=2), network(2, batch=2), samples(6, batch=2), epochs=1, batch=5
    )
    assert result.steps == 3  # twelve samples in batches of four
    (output,) = run(result.module, samples(1, batch=2)["x"][0])
    assert output.shape == (2, 3)


def test_distill_takes_all_samples_at_once_when_there_are_fewer_than_a_batch() -> None:
    assert distill(network(1), network(2), samples(3), epochs=2, batch=32).steps == 2


def test_distill_stops_after_the_epoch_when_the_time_limit_is_over() -> None:
    result = distill(network(1), network(2), samples(4), epochs=50, time_limit_s=0.001)
    assert len(result.losses) == 1
    assert result.notes[0] == "the time limit of 0.001 s ended the training after 1 of 50 epochs"


def test_distill_keeps_the_weights_when_training_diverges() -> None:
    student = network(1)
    result = distill(student, network(2), samples(8), epochs=4, batch=4, learning_rate=1e30)
    assert result.loss_after == result.loss_before
    assert result.notes[0].startswith("training raised the loss from ")
    assert result.notes[0].endswith("the weights stay as they were; a lower learning rate may help")
    assert_structural_equal(result.module, student, map_free_vars=True)


def test_distill_lists_every_layer_when_some_have_no_gradient() -> None:
    with pytest.raises(ModelError) as error:
        distill(network(1, ending="round"), network(2, ending="round"), samples(4), epochs=1)
    assert str(error.value) == (
        "the model cannot be trained\n"
        "  - round: relax.round has no gradient\n"
        "  hint: leave recovery out of the recipe"
    )


def test_distill_raises_when_there_is_nothing_to_train() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 2, 5, 4), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            gv = builder.emit_output(relax.op.mean(x, [2, 3]))
        builder.emit_func_output(gv)
    with pytest.raises(ModelError) as error:
        distill(builder.get(), builder.get(), samples(4), epochs=1)
    assert str(error.value) == (
        "the model has no float32 weight of a convolution or matmul to train"
    )


@pytest.mark.parametrize(
    ("inputs", "options", "text"),
    [
        ({}, {}, "samples for the inputs 'x' are required, given are "),
        (
            {"x": np.zeros((4, 1, 2, 5, 5), "float32")},
            {},
            "x: samples of float32 [*, 1, 2, 5, 4] are required, given are float32 [4, 1, 2, 5, 5]",
        ),
        (
            {"x": np.zeros((4, 1, 2, 5, 4))},
            {},
            "x: samples of float32 [*, 1, 2, 5, 4] are required, given are float64 [4, 1, 2, 5, 4]",
        ),
        (
            samples(0),
            {},
            "recovery needs the same number of samples, at least one, of each input",
        ),
        (samples(1), {"epochs": 0}, "epochs must be at least 1, not 0"),
        (samples(1), {"batch": 0}, "batch must be at least 1, not 0"),
        (samples(1), {"threads": 0}, "threads must be at least 1, not 0"),
        (samples(1), {"mix": 1.5}, "mix must be in [0, 1], not 1.5"),
        (samples(1), {"learning_rate": 0.0}, "the learning rate must be above 0, not 0.0"),
    ],
)
def test_distill_raises_when_samples_or_options_do_not_fit(
    inputs: dict[str, np.ndarray], options: dict, text: str
) -> None:
    with pytest.raises(UsageError) as error:
        distill(network(1), network(2), inputs, **options)
    assert str(error.value) == text


def test_schedule_rises_then_falls_when_the_training_goes_on() -> None:
    assert schedule(0.0) == 0.0
    assert schedule(0.025) == pytest.approx(0.5)
    assert schedule(0.05) == pytest.approx(1.0)
    assert schedule(0.525) == pytest.approx(0.5)
    assert schedule(1.0) == pytest.approx(0.0)


def test_mixed_stays_between_two_samples_when_all_are_mixed() -> None:
    x = np.arange(5, dtype="float32").reshape(5, 1)
    (result,) = mixed([x], 1.0, np.random.default_rng(0))
    assert result.dtype == np.float32
    assert (result >= 0).all()
    assert (result <= 4).all()
    assert (result != x).any()
    (same,) = mixed([x], 0.0, np.random.default_rng(0))
    np.testing.assert_array_equal(same, x)
