"""What a recipe may say of mixed precision."""

from __future__ import annotations

import typing

import pytest

from hone.errors import UsageError
from hone.recipe import parse
from hone.steps.options.mixed import MixedStep, Precision
from hone.steps.quantizers import QUANTIZERS


def test_precisions_of_a_recipe_are_those_that_exist():
    assert set(typing.get_args(Precision)) == set(QUANTIZERS)


def test_title_names_precisions_and_calibration():
    step = MixedStep(kind="mixed", observer="entropy", bias_correction=True)
    assert step.title == "mixed int8 entropy + bias correction"
    assert MixedStep(kind="mixed").title == "mixed int8"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"precisions": []}, "step[0].precisions: required is "),
        ({"precisions": ["int9"]}, "step[0].precisions[0]: required is "),
        ({"precisions": ["int8", "int8"]}, "precisions: listed twice: int8"),
        (
            {"precisions": ["int4-weights"], "observer": "mse", "rounding": "adaptive"},
            "observer, rounding: only for int8, which is not among the precisions",
        ),
        ({"samples": 0}, "step[0].samples: required is greater than or equal to 1, given is 0"),
        ({"seconds": 0}, "step[0].seconds: required is greater than 0, given is 0"),
        ({"percentile": 99.0}, 'percentile is for observer = "percentile"'),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, object], problem: str):
    data = {
        "model": {"path": "a.onnx"},
        "data": {"calibration": "c.npz"},
        "step": [{"kind": "mixed", **options}],
    }
    with pytest.raises(UsageError) as error:
        parse(data)
    assert problem in str(error.value)


def test_mixed_needs_calibration_data():
    with pytest.raises(UsageError, match=r"data.calibration is required by the mixed step"):
        parse({"model": {"path": "a.onnx"}, "step": [{"kind": "mixed"}]})
