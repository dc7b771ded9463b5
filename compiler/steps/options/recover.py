"""Recovery by distillation, a table of several steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Self

from pydantic import Field, model_validator

from .section import Count, Fraction, Seconds, Section


class Recover(Section):
    """``recover`` of a step: distillation from the unchanged model."""

    epochs: Count = Field(default=100, description="passes over the calibration data, at most")
    learning_rate: Annotated[float, Field(gt=0)] = 0.003
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=2.0, description="softens both outputs in the KL loss"
    )
    batch: Count = 32
    seconds: Seconds | None = Field(default=None, description="stops earlier")


class QuantizedRecover(Recover):
    """``recover`` of a step that quantizes: the student computes with quantized weights."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=3e-5, description="the highest one; low, because 8 bits begin near the teacher"
    )
    freeze: list[Fraction] = Field(
        default=[],
        description="put this fraction of each layer's weights on their levels for good, the "
        "largest first, and train the others in float, step by step: rising, the last one 1; "
        "without it all weights are trained on their levels",
    )

    @model_validator(mode="after")
    def _freeze_ends_with_all(self) -> Self:
        rising = all(a < b for a, b in pairwise(self.freeze))
        if self.freeze and not (rising and self.freeze[0] > 0.0 and self.freeze[-1] == 1.0):
            raise ValueError(
                f"freeze needs rising fractions above 0 that end with 1, not {self.freeze}"
            )
        return self


class WeightRecover(QuantizedRecover):
    """``recover`` of a step that quantizes weights to a few bits."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=0.001, description="the highest one; lower it for 8 bits"
    )
    progressive: list[Annotated[int, Field(ge=2, le=8)]] = Field(
        default=[],
        description="train with each of these numbers of bits in turn: falling, the last one the "
        "step's own",
    )

    @model_validator(mode="after")
    def _one_way_only(self) -> Self:
        if self.freeze and self.progressive:
            raise ValueError("progressive and freeze are two ways to one end: give one of them")
        return self
