"""What a recipe may say of weights of few bits."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from .recover import WeightRecover
from .section import Count, Seconds, StepSection

_GROUP = 32


class WeightsStep(StepSection):
    """Store weights in a few bits; kernels decode them, and activations stay float32."""

    selector_key: ClassVar[str | None] = "skip"

    kind: Literal["weights"]
    scheme: Literal["integer", "ternary", "binary", "xnor"] = Field(
        default="integer",
        description="evenly spaced levels; or -1, 0 and 1; or -1 and 1; with a scale. xnor is "
        "binary with the signs of activations, which costs much accuracy",
    )
    bits: Literal[8, 4, 2] | None = Field(
        default=None, description='of a level, with scheme = "integer"; 8 when absent'
    )
    granularity: Literal["tensor", "channel", "group"] = Field(
        default="channel", description="what shares a scale"
    )
    group_size: Count | None = Field(
        default=None,
        description='weights of a group, with granularity = "group"; 32 when absent. The last '
        "group of a channel is shorter where it does not divide the inputs",
    )
    symmetric: bool = Field(
        default=True,
        description='levels about 0; false adds a zero point, with scheme = "integer". Of 2 '
        "symmetric bits only -1, 0 and 1 are used",
    )
    power_of_two: bool = Field(
        default=False, description="scales are powers of two and take one byte instead of four"
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
    recover: WeightRecover | None = Field(
        default=None, description="train weights by distillation while they are quantized"
    )
    skip: list[str] = Field(
        default=[],
        description="layers whose weights stay in float: ids, name:GLOB, re:REGEX, op:TYPE, first, "
        "last, each with ! before it to negate",
    )

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        if self.scheme != "integer" and (self.bits is not None or not self.symmetric):
            raise ValueError('bits and symmetric are for scheme = "integer"')
        if self.scheme == "xnor" and (self.granularity == "group" or self.recover is not None):
            raise ValueError(
                'scheme = "xnor" has no groups, and signs have no gradient to recover by'
            )
        if self.group_size is not None and self.granularity != "group":
            raise ValueError('group_size is for granularity = "group"')
        timed = self.rounding_steps is not None or self.rounding_seconds is not None
        if timed and self.rounding != "adaptive":
            raise ValueError('rounding_steps and rounding_seconds are for rounding = "adaptive"')
        if self.rounding == "adaptive" and self.scheme != "integer":
            raise ValueError('rounding = "adaptive" is for scheme = "integer"')
        if self.recover is not None and self.rounding == "adaptive":
            raise ValueError("recover trains weights for rounding to nearest: leave out rounding")
        return self

    @property
    def level_bits(self) -> int:
        """Bits of an integer level."""
        return 8 if self.bits is None else self.bits

    @property
    def group(self) -> int:
        """Weights of one group."""
        return _GROUP if self.group_size is None else self.group_size

    @property
    def title(self) -> str:
        """The step's row in the report."""
        text = "weights int" + str(self.level_bits)
        if self.scheme != "integer":
            text = f"weights {self.scheme}"
        if not self.symmetric:
            text += " asymmetric"
        if self.granularity == "group":
            text += f", groups of {self.group}"
        elif self.granularity == "tensor":
            text += ", one scale"
        if self.power_of_two:
            text += ", scales 2^n"
        if self.rounding == "adaptive":
            text += " + adaptive rounding"
        if self.recover is not None:
            text += " + recover"
        return text

    @property
    def needs_calibration(self) -> bool:
        """Only what is learned needs samples."""
        return self.recover is not None or self.rounding == "adaptive"
