"""Recovery by distillation, a table of several steps."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .section import Count, Seconds, Section


class Recover(Section):
    """``recover`` of a step: distillation from the unchanged model."""

    epochs: Count = Field(default=100, description="passes over the calibration data, at most")
    learning_rate: Annotated[float, Field(gt=0)] = 0.003
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=2.0, description="softens both outputs in the KL loss"
    )
    batch: Count = 32
    seconds: Seconds | None = Field(default=None, description="stops earlier")
