"""What a recipe may say of the helpers that make integers accurate."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from hone.steps.options.int8 import Int8Step
from hone.steps.options.recover import WeightRecover


def int8(**options: object) -> Int8Step:
    return Int8Step.model_validate({"kind": "int8", **options})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"alpha": 0.5}, 'alpha is for equalize = "activations"'),
        ({"alpha": 0.5, "equalize": "weights"}, 'alpha is for equalize = "activations"'),
        (
            {"rounding_steps": 5},
            'rounding_steps and rounding_seconds are for rounding = "adaptive"',
        ),
        (
            {"rounding_seconds": 5.0},
            'rounding_steps and rounding_seconds are for rounding = "adaptive"',
        ),
        (
            {"rounding": "adaptive", "recover": {}},
            "recover trains weights and biases for rounding to nearest: leave out rounding and "
            "bias_correction",
        ),
        (
            {"bias_correction": True, "recover": {}},
            "recover trains weights and biases for rounding to nearest: leave out rounding and "
            "bias_correction",
        ),
        (
            {"recover": {"freeze": [0.5]}},
            "freeze needs rising fractions above 0 that end with 1, not [0.5]",
        ),
        (
            {"recover": {"freeze": [0.0, 1.0]}},
            "freeze needs rising fractions above 0 that end with 1, not [0.0, 1.0]",
        ),
        ({"recover": {"progressive": [8, 4]}}, "Extra inputs are not permitted"),
    ],
)
def test_options_without_an_effect_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValidationError) as error:
        int8(**options)
    assert text in str(error.value)


def test_stages_of_two_kinds_are_refused() -> None:
    with pytest.raises(ValidationError, match="progressive and freeze are two ways to one end"):
        WeightRecover(progressive=[8, 4], freeze=[0.5, 1.0])


def test_titles_say_which_helpers_work() -> None:
    step = int8(equalize="activations", alpha=0.75, rounding="adaptive", rounding_seconds=2.0)
    assert step.title == "int8 + equalize activations 0.75 + adaptive rounding"
    assert int8(recover={"epochs": 3}).title == "int8 + recover"


def test_titles_say_how_levels_are_chosen() -> None:
    step = int8(weights="asymmetric", power_of_two=True, observer="mse")
    assert step.title == "int8 mse, asymmetric weights, scales 2^n"
