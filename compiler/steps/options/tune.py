"""What a recipe may say of tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .section import Seconds, StepSection


class TuneStep(StepSection):
    """Search for better schedules of what was kept so far."""

    accepts: ClassVar[frozenset[str]] = frozenset({"fp32", "bf16", "fp16", "int8"})

    kind: Literal["tune"]
    seconds: Seconds | None = Field(default=None, description="[tune] seconds when absent")

    @property
    def title(self) -> str:
        """The step's row in the report."""
        return "tuned" if self.seconds is None else f"tuned ({self.seconds:g} s)"
