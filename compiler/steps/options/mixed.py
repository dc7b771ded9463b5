"""What a recipe may say of mixed precision."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .int8 import Int8Options
from .section import Count, Seconds

Precision = Literal["int8", "bf16", "fp16", "int8-weights", "int4-weights"]
"""What a layer may have beside float; `hone.steps.quantizers` has one for each."""


class MixedStep(Int8Options):
    """Give each layer the precision that the accuracy budget and the clock allow."""

    kind: Literal["mixed"]
    precisions: Annotated[list[Precision], Field(min_length=1)] = Field(
        default=["int8"],
        description="what layers may have beside float, the fastest first: integers throughout, "
        "floats of 16 bits, or weights alone of 8 or 4 bits",
    )
    samples: Count = Field(
        default=8,
        description="of the calibration data, on which each layer's sensitivity is measured",
    )
    seconds: Seconds | None = Field(
        default=None,
        description="for calibration and search, which then ends with the best found so far; the "
        "next build goes on",
    )

    @model_validator(mode="after")
    def _precisions_are_different(self) -> Self:
        double = sorted({name for name in self.precisions if self.precisions.count(name) > 1})
        if double:
            raise ValueError(f"precisions: listed twice: {', '.join(double)}")
        return self

    @model_validator(mode="after")
    def _calibration_has_an_effect(self) -> Self:
        idle = sorted(
            self.model_fields_set.intersection(Int8Options.model_fields) - {"kind", "skip"}
        )
        if idle and "int8" not in self.precisions:
            raise ValueError(f"{', '.join(idle)}: only for int8, which is not among the precisions")
        return self

    @property
    def title(self) -> str:
        """The step's row in the report."""
        _, *options = super().title.split(" ", 1)
        return " ".join([f"mixed {'/'.join(self.precisions)}", *options])
