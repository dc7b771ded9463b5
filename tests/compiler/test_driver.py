"""Compile: from model to proven package, its options and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import hone
from hone import driver, models, runtime
from hone.errors import LockedError, ToolchainError, UsageError
from hone.steps.options.half import Fp16Step
from hone.targets.target import resolve
from hone.verify import verify

DIGITS = Path(__file__).parents[2] / "models" / "digits"


@pytest.fixture(scope="module")
def mlp() -> hone.model.Model:
    return hone.load(models.build("mlp"))


@pytest.mark.parametrize("name", models.names())
def test_compile_runs_every_reference_network_with_parity(name: str, tmp_path: Path) -> None:
    messages: list[str] = []

    class Log:
        def task(self, label: str, total: float | None = None):
            return hone.progress.silent().task(label, total)

        def log(self, message: str) -> None:
            messages.append(message)

    package = hone.compile(hone.load(models.build(name)), threads=2, progress=Log())
    assert any(m.startswith("parity with onnxruntime: equal") for m in messages)
    package.save(tmp_path / "x.hone")
    assert verify(tmp_path / "x.hone").samples == 2


def test_compile_is_byte_identical_in_another_process(
    mlp: hone.model.Model, tmp_path: Path
) -> None:
    here = hone.compile(mlp, threads=2).to_bytes()
    code = (
        "import hone, sys; from hone import models;"
        "hone.compile(hone.load(models.build('mlp')), threads=2).save(sys.argv[1])"
    )
    path = tmp_path / "there.hone"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=tmp_path)
    assert path.read_bytes() == here


def test_compile_records_layers_of_every_kernel() -> None:
    package = hone.compile(hone.load(DIGITS / "digits.onnx"), threads=1)
    covered = {layer for layers in package.manifest.kernels.values() for layer in layers}
    assert {"/conv1/Conv", "/conv2/Conv", "/conv3/Conv", "/fc/Gemm", "/pool2/MaxPool"} <= covered


def test_compile_int8_gives_an_integer_package() -> None:
    model = hone.load(DIGITS / "digits.onnx")
    package = hone.compile(
        model, threads=1, precision="int8", calibration=str(DIGITS / "calibration.npz")
    )
    assert package.manifest.precision == "int8"
    assert package.weights_bytes < 0.3 * model.origin.weights_bytes
    data = np.load(DIGITS / "evaluation.npz")
    runner = runtime.load(package)
    right = [
        runner.run({"image": image[None]})["logits"].argmax() == label
        for image, label in zip(data["image"], data["labels"], strict=True)
    ]
    assert np.mean(right) >= 0.985


def test_compile_for_another_board_gives_a_package_that_this_machine_refuses() -> None:
    foreign = "rpi4" if resolve("host").arch == "x86_64" else "x86-64-v3"
    package = hone.compile(hone.load(models.build("mlp")), target=foreign, threads=2)
    assert package.manifest.target.name == foreign
    assert len(package.golden()) == 2
    with pytest.raises(hone.errors.PackageError, match=resolve(foreign).arch):
        runtime.load(package)


def test_compile_is_an_error_when_a_record_is_missing_and_locked(
    mlp: hone.model.Model, tmp_path: Path
) -> None:
    with pytest.raises(LockedError, match=r"^\d+ of \d+ kernels have no tuning record: ") as caught:
        hone.compile(mlp, threads=2, database=tmp_path, locked=True)
    assert caught.value.exit_code == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads must be at least 1, not 0"),
        ({"precision": "fp8"}, "precision 'fp8' is not available in this version\n"
         "  hint: one of fp32, bf16, fp16, int8"),
        ({"precision": "bf16", "half": Fp16Step(kind="fp16")},
         "options of fp16 need precision fp16\n  hint: precision='fp16'"),
        ({"locked": True}, "locked needs a database of tuning records\n  hint: --database DIR"),
        ({"precision": "int8"}, "int8 needs calibration data: a few hundred samples of what the "
         "model will see\n  hint: --calibration DATA, such as calibration.npz"),
    ],
    ids=str,
)  # fmt: skip
def test_compile_is_an_error_when_options_do_not_go_together(
    options: dict[str, object], message: str, mlp: hone.model.Model
) -> None:
    with pytest.raises(UsageError) as caught:
        hone.compile(mlp, **options)
    assert str(caught.value) == message


def test_compile_is_an_error_for_a_gpu_until_there_is_code_for_one(mlp: hone.model.Model) -> None:
    with pytest.raises(ToolchainError, match="CUDA") as caught:
        hone.compile(mlp, target="sm_90")
    assert caught.value.exit_code == 6


def test_tune_is_an_error_when_the_target_is_another_machine(
    mlp: hone.model.Model, tmp_path: Path
) -> None:
    foreign = "rpi4" if resolve("host").arch == "x86_64" else "x86-64-v3"
    with pytest.raises(ToolchainError, match="tuning measures on the target"):
        driver.tune(mlp, target=foreign, budget_s=1, database=tmp_path)


def test_compile_without_source_says_that_parity_is_not_checked(mlp: hone.model.Model) -> None:
    messages: list[str] = []

    class Log:
        def task(self, label: str, total: float | None = None):
            return hone.progress.silent().task(label, total)

        def log(self, message: str) -> None:
            messages.append(message)

    hone.compile(replace(mlp, source=None), threads=1, progress=Log())
    assert messages == [
        "parity with onnxruntime: not checked: the model's ONNX source was not kept"
    ]


def test_compile_takes_a_proto_or_a_path(tmp_path: Path) -> None:
    proto = models.build("mlp")
    onnx.save(proto, tmp_path / "mlp.onnx")
    from_path = hone.load(tmp_path / "mlp.onnx")
    from_proto = hone.load(proto)
    assert from_path.signature == from_proto.signature


def test_compile_int8_says_so_when_no_layer_fits() -> None:
    from hone.data import Dataset

    value = onnx.helper.make_tensor_value_info
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Add", ["a", "b"], ["y"])],
            "sum",
            [value("a", 1, [1, 3]), value("b", 1, [1, 3])],
            [value("y", 1, [1, 3])],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
    )
    samples = Dataset(
        inputs={name: np.ones((2, 1, 3), np.float32) for name in "ab"}, labels=None, source="ones"
    )
    messages: list[str] = []

    class Log:
        def task(self, label: str, total: float | None = None):
            return hone.progress.silent().task(label, total)

        def log(self, message: str) -> None:
            messages.append(message)

    package = hone.compile(hone.load(proto), precision="int8", calibration=samples, progress=Log())
    assert package.manifest.precision == "fp32"
    assert "int8: no layer fits int8" in messages


def test_compile_is_an_error_when_it_is_given_something_else(mlp: hone.model.Model) -> None:
    with pytest.raises(UsageError, match="a model is required, given is a str"):
        hone.compile("mlp.onnx")
    with pytest.raises(UsageError, match=r"threads must be at least 1, not 2\.5"):
        hone.compile(mlp, threads=2.5)
