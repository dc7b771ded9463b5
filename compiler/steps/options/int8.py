"""What a recipe may say of 8-bit integers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from .recover import QuantizedRecover
from .section import Count, Fraction, Seconds, StepSection


class Int8Options(StepSection):
    """How a step that writes layers in 8-bit integers calibrates, and which ones it leaves."""

    selector_key: ClassVar[str | None] = "skip"

    observer: Literal["minmax", "moving_average", "percentile", "entropy", "mse"] = Field(
        default="minmax", description="chooses the range of an activation from calibration data"
    )
    percentile: Annotated[float, Field(gt=50, le=100)] | None = Field(
        default=None,
        description="of the values that the range holds, with the observer percentile; "
        "99.99 when absent",
    )
    weights: Literal["symmetric", "asymmetric"] = Field(
        default="symmetric",
        description="levels of weights about 0, or with a zero point for each output channel, "
        "which takes one more sum over each window of the input",
    )
    power_of_two: bool = Field(
        default=False,
        description="scales of weights and activations are powers of two: requantization is a "
        "shift, and steps are up to twice as coarse",
    )
    equalize: Literal["weights", "activations"] | None = Field(
        default=None,
        description="scale channels between layers first, so that the ranges of weights on both "
        "sides are equal, or those of activations and the weights that read them",
    )
    alpha: Fraction | None = Field(
        default=None,
        description='with equalize = "activations": how much of the difference between channels '
        "moves from the activation to the weights that read it; 0.5 when absent",
    )
    rounding: Literal["nearest", "adaptive"] = Field(
        default="nearest",
        description="each weight goes to the nearest level, or to the one below or above, learned "
        "from calibration data so that each layer's output changes least",
    )
    rounding_steps: Count | None = Field(
        default=None,
        description='optimizer steps of each layer, with rounding = "adaptive"; 1000 when absent',
    )
    rounding_seconds: Seconds | None = Field(
        default=None, description="stops the learning of all layers' rounding earlier"
    )
    recover: QuantizedRecover | None = Field(
        default=None, description="train weights by distillation while they are quantized"
    )
    bias_correction: bool = Field(
        default=False, description="take the mean error of quantization out of each layer's bias"
    )
    skip: list[str] = Field(
        default=[],
        description="layers that stay in float: ids, name:GLOB, re:REGEX, op:TYPE, first, last, "
        "each with ! before it to negate",
    )

    @model_validator(mode="after")
    def _percentile_has_an_effect(self) -> Self:
        if self.percentile is not None and self.observer != "percentile":
            raise ValueError(
                f'percentile is for observer = "percentile", not for {self.observer!r}'
            )
        return self

    @model_validator(mode="after")
    def _helpers_have_an_effect(self) -> Self:
        if self.alpha is not None and self.equalize != "activations":
            raise ValueError('alpha is for equalize = "activations"')
        timed = self.rounding_steps is not None or self.rounding_seconds is not None
        if timed and self.rounding != "adaptive":
            raise ValueError('rounding_steps and rounding_seconds are for rounding = "adaptive"')
        if self.recover is not None and (self.rounding == "adaptive" or self.bias_correction):
            raise ValueError(
                "recover trains weights and biases for rounding to nearest: leave out "
                "rounding and bias_correction"
            )
        return self

    @property
    def title(self) -> str:
        """The step's row in the report."""
        text = self.kind
        if self.observer != "minmax":
            text += f" {self.observer.replace('_', ' ')}"
        if self.percentile is not None:
            text += f" {self.percentile:g}"
        if self.weights == "asymmetric":
            text += ", asymmetric weights"
        if self.power_of_two:
            text += ", scales 2^n"
        if self.equalize is not None:
            text += f" + equalize {self.equalize}"
        if self.alpha is not None:
            text += f" {self.alpha:g}"
        if self.rounding == "adaptive":
            text += " + adaptive rounding"
        if self.recover is not None:
            text += " + recover"
        if self.bias_correction:
            text += " + bias correction"
        return text

    @property
    def needs_calibration(self) -> bool:
        """The ranges of activations come from calibration data."""
        return True


class Int8Step(Int8Options):
    """Compute convolutions and matrix products in 8-bit integers."""

    kind: Literal["int8"]
