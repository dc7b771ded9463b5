from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from hone import models
from hone.models.digits import train

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

FOLDER = Path(train.__file__).parent
SPLITS = ("calibration", "evaluation")


def committed_model() -> onnx.ModelProto:
    return onnx.load(FOLDER / "digits.onnx")


def committed(split: str) -> train.Samples:
    with np.load(FOLDER / f"{split}.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["image", "labels"]
        return train.Samples(image=file["image"], labels=file["labels"])


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def test_accuracy_is_at_least_97_percent_on_the_evaluation_split() -> None:
    assert train.accuracy(committed_model(), committed("evaluation")) >= 0.97


def test_accuracy_is_chance_when_the_weights_are_random() -> None:
    assert train.accuracy(models.build("digits-cnn"), committed("evaluation")) < 0.3


@pytest.mark.parametrize(
    ("split", "least", "most"), [("calibration", 250, 260), ("evaluation", 440, 540)]
)
def test_split_holds_stratified_images(split: str, least: int, most: int) -> None:
    samples = committed(split)
    assert least <= len(samples) <= most
    assert samples.image.shape == (len(samples), 1, 8, 8)
    assert samples.image.dtype == np.float32
    assert samples.labels.shape == (len(samples),)
    assert samples.labels.dtype == np.int64
    assert samples.image.min() == 0.0
    assert samples.image.max() == 1.0
    counts = np.bincount(samples.labels, minlength=10)
    assert len(counts) == 10
    assert counts.max() - counts.min() <= 4


def test_splits_are_disjoint() -> None:
    def rows(samples: train.Samples) -> set[bytes]:
        return {image.tobytes() for image in samples.image}

    training, calibration, evaluation = train.splits()
    assert len(training) + len(evaluation) == 1797
    assert rows(calibration) <= rows(training)
    assert not rows(training) & rows(evaluation)


@pytest.mark.parametrize("split", SPLITS)
def test_committed_split_is_what_the_script_makes(split: str) -> None:
    made = dict(zip(("training", *SPLITS), train.splits(), strict=True))[split]
    np.testing.assert_array_equal(committed(split).image, made.image)
    np.testing.assert_array_equal(committed(split).labels, made.labels)


def test_committed_model_has_the_architecture_of_the_builder() -> None:
    trained, random = committed_model(), models.build("digits-cnn")
    onnx.checker.check_model(trained, full_check=True)
    assert trained.graph.node == random.graph.node
    assert trained.graph.input == random.graph.input
    assert trained.graph.output == random.graph.output
    first, second = initializers(trained), initializers(random)
    assert {name: (a.shape, a.dtype) for name, a in first.items()} == {
        name: (a.shape, a.dtype) for name, a in second.items()
    }
    assert all(not np.array_equal(first[name], second[name]) for name in first)


def test_running_statistics_are_those_of_the_training_images() -> None:
    training, _, _ = train.splits()
    model = committed_model()
    values = initializers(model)
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert len(norms) == 3
    for norm in norms:
        activation, _, _, mean, variance = norm.input
        measured = np.concatenate(train.run(model, training.image, activation))
        np.testing.assert_allclose(
            values[mean], measured.mean(axis=(0, 2, 3)), rtol=1e-3, atol=1e-4
        )
        np.testing.assert_allclose(values[variance], measured.var(axis=(0, 2, 3)), rtol=1e-3)


def test_settle_statistics_restores_them_when_they_were_lost() -> None:
    training, _, _ = train.splits()
    model = committed_model()
    expected = initializers(model)
    for initializer in model.graph.initializer:
        if initializer.name.endswith((".running_mean", ".running_var")):
            ones = np.ones_like(expected[initializer.name])
            initializer.CopyFrom(numpy_helper.from_array(ones, initializer.name))
    train.settle_statistics(model, training)
    for name, value in initializers(model).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_relax_backbone_agrees_with_the_onnx_model() -> None:
    import tvm
    from tvm import relax

    values = initializers(committed_model())
    module = relax.transform.DecomposeOpsForInference("backbone")(train.backbone(values))
    module = relax.transform.LegalizeOps()(module)
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    images = committed("evaluation").image[: train.BATCH]
    named = {"image": images} | values
    feeds = [tvm.runtime.tensor(named[p.name]) for p in module["backbone"].params]
    logits = machine["backbone"](*feeds)[0].numpy()

    expected = np.concatenate(train.run(committed_model(), images, "logits"))
    # Sums of at most 576 fp32 products: about √576 roundings of 6e-8 each.
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_train_lowers_the_loss_and_repeats_exactly_when_the_seed_is_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    training, _, _ = train.splits()
    few = training.take(np.arange(train.BATCH))
    initial = initializers(models.build("digits-cnn"))
    first = train.train(few, initial, schedule=[(6, 0.02)])
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 6
    assert losses[-1] < 0.8 * losses[0]
    assert all(not np.array_equal(first[name], initial[name]) for name in initial)
    assert all(np.isfinite(value).all() for value in first.values())

    again = train.train(few, initial, schedule=[(6, 0.02)])
    assert all(np.array_equal(first[name], again[name]) for name in initial)
