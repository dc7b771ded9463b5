"""A network in 16-bit floats against onnxruntime in float32."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest

from hone import deviation, driver, half_parity, importer, parity
from hone.errors import AccuracyError
from hone.half_parity import check_half
from hone.model import Model
from hone.parity import Status
from hone.progress import silent
from hone.reference import NotCheckedError, reference


@pytest.fixture(scope="module")
def digits() -> Model:
    return importer.load(files("hone.models") / "digits" / "digits.onnx")


def moved(model: Model, factor: float):
    """Return onnxruntime's own answers, off by a factor."""
    session = reference(model, threads=1)

    def run(inputs):
        return {name: array * np.float32(factor) for name, array in session.run(inputs).items()}

    return run


def test_rounded_outputs_are_equal_and_say_by_how_much_they_are_off(digits: Model) -> None:
    report = check_half(digits, moved(digits, 1.05), precision="bf16")
    assert report.status is Status.EQUAL
    assert report.worst == pytest.approx(0.05, rel=1e-3)
    assert (report.samples, report.outputs[0].tolerance) == (2, deviation.TOLERANCE["bfloat16"])


@pytest.mark.parametrize(
    ("precision", "factor"), [("bf16", 1.2), ("fp16", 1.05), ("bf16", float("nan"))]
)
def test_more_than_rounding_is_an_error(digits: Model, precision: str, factor: float) -> None:
    with pytest.raises(AccuracyError, match=f"computed in {precision} is further") as caught:
        check_half(digits, moved(digits, factor), precision=precision)
    assert caught.value.exit_code == 4
    assert caught.value.hint is not None


def test_compile_checks_the_network_that_it_packages(
    digits: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def check(model, run, *, precision, threads):
        seen.append((precision, run(parity.random_inputs(model))))
        return check_half(model, run, precision=precision, threads=threads)

    monkeypatch.setattr(driver, "check_half", check)
    package = driver.compile(digits, precision="bf16", threads=1, progress=silent())
    ((precision, outputs),) = seen
    assert precision == package.manifest.precision == "bf16"
    golden = reference(digits, threads=1).run(parity.random_inputs(digits))
    error = max(deviation.relative_error(outputs[name], golden[name]) for name in golden)
    assert 1e-4 < error < deviation.TOLERANCE["bfloat16"]


def test_says_so_where_onnxruntime_cannot_run_the_model(
    digits: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotCheckedError("no operator")

    monkeypatch.setattr(half_parity, "reference", refuse)
    report = check_half(digits, lambda inputs: inputs, precision="bf16")
    assert (report.status, report.reason) == (Status.NOT_CHECKED, "no operator")
